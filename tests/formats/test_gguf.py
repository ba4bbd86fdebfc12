"""Q4_0, Q4_1 and Q8_0 against the gguf package, and against the description read one byte at a
time."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantflow.errors import FormatError
from quantflow.formats.base import ConfigRequest
from quantflow.formats.gguf import Gguf, type_of
from quantflow.formats.weight import Weight
from quantflow.quant.numbers import QuantizedTensor
from quantflow.quant.numbers.integer import IntegerTensor
from quantflow.quant.numbers.minimum import MinimumTensor
from quantflow.quant.scheme import Scheme
from tests.formats.helpers import random_tensor

gguf = pytest.importorskip("gguf")

FORMAT = Gguf()
MODULE = "model.layers.0.self_attn.q_proj"
TYPES = {
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "q4_1": gguf.GGMLQuantizationType.Q4_1,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
SCHEMES = [
    Scheme(4, g, *rest)
    for g in (32, 64, 128, -1)
    for rest in ((True,), (False,), (False, "minimum"))
]
SCHEMES += [Scheme(8, g, True) for g in (32, 64, 128, -1)]


def tensor_of(scheme: Scheme, n: int, k: int, seed: int = 0) -> QuantizedTensor:
    """Random codes on a grid that the format holds: scales of few digits, so that -zero * scale is
    an exact fp16."""
    found = random_tensor(n, k, scheme, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    scales = found.scales
    if scheme.kind == "minimum":
        return MinimumTensor(
            scheme, found.codes, scales, torch.randn(scales.shape, generator=generator).half()
        )
    if not scheme.symmetric:
        scales = (torch.randint(1, 128, scales.shape, generator=generator) / 4096).half()
    return IntegerTensor(scheme, found.codes, scales, found.zeros)


def config_of(scheme: Scheme) -> dict[str, Any]:
    return FORMAT.quantization_config(ConfigRequest({MODULE: scheme}, [], scheme))


def assert_same(a: QuantizedTensor, b: QuantizedTensor) -> None:
    assert type(a) is type(b) and a.scheme == b.scheme
    for part in ("codes", "scales", "minimums" if isinstance(a, MinimumTensor) else "zeros"):
        x, y = getattr(a, part), getattr(b, part)
        assert x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y), part


def same_bits(a: torch.Tensor, b: np.ndarray) -> bool:
    """Numbers alike, of either sign of zero: (8 - 8) * -d is -0 to one and 0 to the other."""
    return a.dtype == torch.float32 and b.dtype == np.float32 and np.array_equal(a.numpy(), b)


@pytest.mark.parametrize("shape", [(1, 128), (5, 256), (32, 384)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_package_dequantises_to_the_same_numbers(
    scheme: Scheme, shape: tuple[int, int]
) -> None:
    tensor = tensor_of(scheme, *shape)
    (name, stored), *others = FORMAT.encode(MODULE, tensor, torch.bfloat16).items()
    kind = type_of(scheme)
    assert (
        not others
        and name == f"{MODULE}.{kind}"
        and stored.dtype == torch.uint8
        and kind is not None
    )
    assert FORMAT.specs(Weight(MODULE, shape, scheme), "float16") == {
        name: ("U8", tuple(stored.shape))
    }
    assert same_bits(tensor.dequantize(), gguf.quants.dequantize(stored.numpy(), TYPES[kind]))
    assert_same(FORMAT.decode(MODULE, {name: stored}, config_of(scheme)), tensor)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_blocks_byte_by_byte(scheme: Scheme) -> None:
    """fp16 d (and m), then byte i: code i low and code i + 16 high, or a signed code a byte."""
    n, k = 3, 256
    tensor = tensor_of(scheme, n, k, seed=1)
    kind = type_of(scheme)
    raw = FORMAT.encode(MODULE, tensor, torch.bfloat16)[f"{MODULE}.{kind}"]
    expected = tensor.dequantize(torch.float64)
    size = {"q4_0": 18, "q4_1": 20, "q8_0": 34}[str(kind)]
    for row in range(n):
        for block in range(k // 32):
            data = bytes(raw[row, block * size : (block + 1) * size].tolist())
            (d,) = struct.unpack_from("<e", data)
            for i in range(32):
                if kind == "q8_0":
                    value = struct.unpack_from("<b", data, 2 + i)[0] * d
                elif kind == "q4_0":
                    value = ((data[2 + i % 16] >> 4 * (i // 16) & 15) - 8) * d
                else:
                    value = (data[4 + i % 16] >> 4 * (i // 16) & 15) * d + struct.unpack_from(
                        "<e", data, 2
                    )[0]
                assert value == expected[row, block * 32 + i], (row, block, i)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SCHEMES), st.integers(1, 4), st.integers(1, 3), st.integers(0, 10**6))
def test_round_trip(scheme: Scheme, n: int, k: int, seed: int) -> None:
    tensor = tensor_of(scheme, n, 128 * k, seed)
    assert_same(
        FORMAT.decode(MODULE, FORMAT.encode(MODULE, tensor, torch.float16), config_of(scheme)),
        tensor,
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_any_scale_is_held_exactly_or_refused(seed: int) -> None:
    """About half of random scales have a -zero * scale that is no fp16."""
    tensor = random_tensor(2, 64, Scheme(4, 32, False), seed=seed)
    products = tensor.zeros.double() * tensor.scales.double()
    if torch.equal(products.half().double(), products):
        assert_same(
            FORMAT.decode(
                MODULE, FORMAT.encode(MODULE, tensor, torch.float16), config_of(tensor.scheme)
            ),
            tensor,
        )
    else:
        with pytest.raises(FormatError, match=r"no exact float16"):
            FORMAT.encode(MODULE, tensor, torch.float16)


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_what_the_package_quantised(kind: str) -> None:
    generator = np.random.default_rng(3)
    weight = generator.standard_normal((16, 128)).astype(np.float32)
    weight[3] = 0  # scales of 0
    raw = torch.from_numpy(gguf.quants.quantize(weight, TYPES[kind]))
    found = FORMAT.decode(
        MODULE, {f"{MODULE}.{kind}": raw}, {"quant_method": "gguf", "types": {MODULE: kind}}
    )
    if kind == "q4_0":
        assert bool((found.scales < 0).any())
    assert found.scheme.group_size == 32 and same_bits(
        found.dequantize(), gguf.quants.dequantize(raw.numpy(), TYPES[kind])
    )
    again = FORMAT.encode(MODULE, found, torch.float16)[f"{MODULE}.{kind}"]
    assert torch.equal(again, raw)


def test_refusals() -> None:
    def check(scheme: Scheme, shape: tuple[int, int] = (32, 64), index: bool = False) -> str:
        return "\n".join(map(str, FORMAT.check(Weight(MODULE, shape, scheme, index))))

    assert all(check(scheme, (32, 384)) == "" for scheme in SCHEMES)
    for scheme in (
        Scheme(2, 32, True),
        Scheme(3, 32, False),
        Scheme(8, 32, False),
        Scheme(8, 32, False, "minimum"),
    ):
        assert "what Q4_0, Q4_1 and Q8_0 hold" in check(scheme)
    assert "with integer zero points" in check(Scheme(4, 64, False, "nf4"))
    assert "group_size 16; expected a multiple of 32" in check(Scheme(4, 16, True))
    assert "group_size 48" in check(Scheme(4, 48, True), (32, 96))
    assert "80 input channels; expected a multiple of 32" in check(Scheme(4, -1, True), (32, 80))
    assert "group index" in check(Scheme(4, 32, True), index=True)
    assert not FORMAT.parallel
    indexed = random_tensor(32, 64, Scheme(4, 32, True), index=True)
    with pytest.raises(FormatError, match="group index"):
        FORMAT.encode(MODULE, indexed, torch.float16)
    with pytest.raises(FormatError, match="group index"):
        FORMAT.quantization_config(ConfigRequest({}, [], Scheme(4, 32, True), act_order=True))
    wide = tensor_of(Scheme(4, 32, True), 2, 64)
    for scale in (1e5, 1e-9, 0.1):
        inexact = IntegerTensor(
            wide.scheme,
            wide.codes,
            torch.full((2, 2), scale),
            torch.full((2, 2), 8, dtype=torch.uint8),
        )
        with pytest.raises(FormatError, match="4 of 4 scales are no exact float16"):
            FORMAT.encode(MODULE, inexact, torch.float16)


@pytest.mark.parametrize(
    "said",
    [
        [4, 64, False, "minimum"],
        [4, 32, True, "integer"],
        [4, 16, False, "integer"],
        [4, 96, False, "integer"],
        [4, 0, False, "integer"],
        [4, -2, False, "integer"],
        [True, 32, False, "integer"],
        [4, 32, False, "nf4"],
        [4, 32, False],
        "W4",
        {"bits": 4},
        7,
        [8, 32, False, "integer"],
        [4, 10**30, False, "integer"],
    ],
    ids=str,
)
def test_false_schemes_are_refused(said: Any) -> None:
    """Every block below has a scale and a minimum of its own."""
    generator = torch.Generator().manual_seed(0)
    numbers = (
        (torch.rand(4, 4, 2, generator=generator) + 0.1).half().view(torch.uint8).view(4, 4, 4)
    )
    codes = torch.randint(0, 256, (4, 4, 16), generator=generator, dtype=torch.uint8)
    stored = torch.cat((numbers, codes), -1).view(4, -1)
    config = {"types": {MODULE: "q4_1"}, "schemes": {MODULE: said}}
    with pytest.raises(FormatError, match=r"quantflow\.schemes|multiple of group_size"):
        FORMAT.decode(MODULE, {f"{MODULE}.q4_1": stored}, config)


def test_minimums_of_no_zero_point_and_not_finite() -> None:
    scheme = Scheme(4, 32, False, "minimum")
    tensor = tensor_of(scheme, 4, 64)
    stored = FORMAT.encode(MODULE, tensor, torch.float16)[f"{MODULE}.q4_1"]
    claimed = config_of(Scheme(4, 32, False))
    with pytest.raises(FormatError, match=r"minimums that are no -zero \* scale"):
        FORMAT.decode(MODULE, {f"{MODULE}.q4_1": stored}, claimed)
    for number in (float("nan"), float("inf")):
        bad = stored.clone()
        bad[1, 2:4] = torch.tensor([number]).half().view(torch.uint8)
        with pytest.raises(FormatError, match="minimums"):
            FORMAT.decode(MODULE, {f"{MODULE}.q4_1": bad}, config_of(scheme))


@pytest.mark.parametrize(
    "config",
    [
        {"types": []},
        {"types": {MODULE: "q9"}},
        {"types": {MODULE: ["q4_0"]}},
        {"types": {MODULE: "q4_0"}, "schemes": 3},
    ],
)
def test_a_config_of_another_shape_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="quantization_config"):
        FORMAT.scheme_of(MODULE, config)
