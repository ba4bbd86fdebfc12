"""BitBLAS's layout against bytes that its own package made, and against loops over single codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from quantflow.errors import FormatError
from quantflow.formats import FORMATS
from quantflow.formats.base import ConfigRequest
from quantflow.formats.weight import Weight
from quantflow.quant.numbers.integer import IntegerTensor
from quantflow.quant.scheme import Scheme
from tests.formats.helpers import assert_same, random_tensor

BITBLAS = FORMATS["bitblas"]
VECTORS = Path(__file__).parent / "vectors" / "bitblas.safetensors"
MODULE = "model.layers.0.self_attn.q_proj"


def config_of(scheme: Scheme) -> dict[str, Any]:
    return BITBLAS.quantization_config(ConfigRequest({MODULE: scheme}, ["lm_head"], scheme))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bytes_of_the_package(bits: int, dtype: torch.dtype) -> None:
    with safe_open(VECTORS, "pt") as file:
        assert json.loads(file.metadata()["cases"]).keys() == {"2", "4", "8"}
        theirs = {
            name.partition(".")[2]: file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118 - no dictionary
            if name.startswith(f"{bits}.")
        }
    scheme = Scheme(bits, 32, symmetric=False)
    n, k = theirs["codes"].shape
    scales = torch.rand(n, k // 32).to(dtype)
    tensor = IntegerTensor(scheme, theirs["codes"], scales, theirs["zeros"].t().contiguous())
    ours = BITBLAS.encode(MODULE, tensor, dtype)
    expected = theirs["interleaved" if bits < 8 and dtype == torch.float16 else "qweight"]
    assert torch.equal(ours[f"{MODULE}.qweight"], expected.view(torch.int8))
    assert torch.equal(ours[f"{MODULE}.qzeros"], theirs["qzeros"])
    assert_same(BITBLAS.decode(MODULE, ours, config_of(scheme)), tensor)


def stored(words: list[int], row: int, width: int, column: int, bits: int, mixed: bool) -> int:
    """Code `column` of a row of `width` bytes, by where the layout's description says it is."""
    per_word = 32 // bits
    element = column % per_word
    place = bits * element
    if mixed:
        place = 16 * (element % 2) + bits * (element // 2)
        if bits == 2 and place // 8 in (1, 2):
            place = 8 * (3 - place // 8) + place % 8
    byte = words[row * width + 4 * (column // per_word) + place // 8] & 255
    return byte >> (place % 8) & (2**bits - 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_code_at_a_time(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    scheme, n, k = Scheme(bits, 32, symmetric), 16, 96
    tensor = random_tensor(n, k, scheme, seed=bits, dtype=dtype)
    ours = BITBLAS.encode(MODULE, tensor, dtype)
    mixed = dtype == torch.float16 and bits < 8
    words, width = ours[f"{MODULE}.qweight"].flatten().tolist(), k * bits // 8
    codes = [[stored(words, row, width, c, bits, mixed) for c in range(k)] for row in range(n)]
    assert codes == tensor.codes.tolist()
    zeros = ours[f"{MODULE}.qzeros"]
    if symmetric:
        assert zeros.shape == (0,)  # codes are offset by 2^(bits - 1)
        return
    per_byte = 8 // bits
    assert tensor.zeros.tolist() == [
        [
            (int(zeros[group, row // per_byte]) & 255) >> bits * (row % per_byte) & (2**bits - 1)
            for group in range(k // 32)
        ]
        for row in range(n)
    ]


def test_older_names_are_read() -> None:
    scheme = Scheme(4, 32, symmetric=False)
    tensor = random_tensor(32, 64, scheme)
    ours = BITBLAS.encode(MODULE, tensor, torch.float16)
    ours[f"{MODULE}.zeros"] = ours.pop(f"{MODULE}.qzeros")
    assert_same(BITBLAS.decode(MODULE, ours, config_of(scheme)), tensor)


@pytest.mark.parametrize(
    ("shape", "scheme", "index", "message"),
    [
        ((32, 64), Scheme(3, 32, symmetric=True), False, "3 bits; expected 2, 4 or 8"),
        ((32, 64), Scheme(4, 16, symmetric=True), False, "groups of 16; expected 32, 64, 128"),
        ((24, 64), Scheme(4, 32, symmetric=True), False, "24 output channels; expected a multiple"),
        ((32, 64), Scheme(4, 32, symmetric=True), True, "a group index, which BitBLAS cannot hold"),
    ],
)
def test_what_the_kernels_do_not_read(
    shape: tuple[int, int], scheme: Scheme, index: bool, message: str
) -> None:
    problems = BITBLAS.check(Weight(MODULE, shape, scheme, index))
    assert len(problems) == 1 and message in str(problems[0])


def test_the_nearest_scheme_is_held() -> None:
    for bits, group in ((3, 32), (5, 256), (4, 96), (8, -1), (2, 64)):
        weight = Weight(MODULE, (64, 768), Scheme(bits, group, symmetric=False))
        nearest = BITBLAS.nearest(weight)
        assert not BITBLAS.check(Weight(MODULE, (64, 768), nearest)), (bits, group, nearest)


def test_zero_points_of_symmetric_weights_are_refused() -> None:
    scheme = Scheme(4, 32, symmetric=True)
    ours = BITBLAS.encode(MODULE, random_tensor(32, 64, scheme), torch.float16)
    ours[f"{MODULE}.qzeros"] = torch.zeros(2, 16, dtype=torch.int8)
    with pytest.raises(FormatError, match=r"qzeros: shape \[2, 16\] with sym: true"):
        BITBLAS.decode(MODULE, ours, config_of(scheme))


def test_symmetric_bfloat16_is_doubted() -> None:
    scheme = Scheme(4, 32, symmetric=True)
    request = ConfigRequest({MODULE: scheme}, [], scheme, model_dtype="bfloat16")
    assert any("bfloat16" in str(problem) for problem in BITBLAS.doubts(request))
    plain = ConfigRequest({MODULE: scheme}, [], scheme, model_dtype="float16")
    assert not BITBLAS.doubts(plain)
