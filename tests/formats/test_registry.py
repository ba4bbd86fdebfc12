"""What holds for every format."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantflow.errors import FormatError
from quantflow.formats import FORMATS, detect
from quantflow.formats.base import ConfigRequest
from quantflow.formats.weight import Weight
from quantflow.quant.numbers.integer import IntegerTensor
from quantflow.quant.scheme import Scheme
from tests.formats.helpers import assert_same, random_tensor

SAFETENSORS = {
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
MODULE = "model.layers.0.self_attn.q_proj"
# what holds integer grids, in a Hugging Face directory
INTEGER = ("awq", "bitblas", "compressed-tensors", "gptq", "gptq_v2")
HELD = (*INTEGER, "gguf", "turbomind")


def scheme_strategy() -> st.SearchStrategy[Scheme]:
    return st.builds(Scheme, st.integers(2, 8), st.sampled_from((-1, 16, 32)), st.booleans())


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(INTEGER),
    scheme_strategy(),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 1000),
    st.sampled_from((torch.float16, torch.bfloat16, torch.float32)),
)
def test_round_trip_is_exact_or_refused(
    name: str, scheme: Scheme, n: int, k: int, index: bool, seed: int, model_dtype: torch.dtype
) -> None:
    form = FORMATS[name]
    shape = (32 * n, 32 * k)
    dtype_name = str(model_dtype).removeprefix("torch.")
    scale_dtype = form.scale_dtype(dtype_name)
    tensor = random_tensor(
        *shape,
        scheme,
        seed=seed,
        index=index,
        dtype=getattr(torch, scale_dtype),
        smallest_zero=int(name == "gptq"),
    )
    if form.check(Weight(MODULE, shape, scheme, index)):
        with pytest.raises(FormatError, match=MODULE):
            form.encode(MODULE, tensor, model_dtype)
        return
    encoded = form.encode(MODULE, tensor, model_dtype)
    specs = form.specs(Weight(MODULE, shape, scheme), scale_dtype)
    assert list(specs.items()) == [
        (key, (SAFETENSORS[value.dtype], tuple(value.shape))) for key, value in encoded.items()
    ]
    assert all(value.is_contiguous() for value in encoded.values())
    assert all(key.removeprefix(MODULE) in form.suffixes for key in encoded)
    assert sum(MODULE + mark in encoded for mark in form.marks) == 1
    config = form.quantization_config(
        ConfigRequest({MODULE: scheme}, ["lm_head"], scheme, act_order=index)
    )
    if index and scheme.groups(shape[1]) == 1:  # one group: the index says nothing, and is not kept
        tensor = IntegerTensor(scheme, tensor.codes, tensor.scales, tensor.zeros)
    assert_same(form.decode(MODULE, encoded, config), tensor)


@pytest.mark.parametrize("name", [*HELD])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scheme_of_ignored_and_detected(name: str, symmetric: bool) -> None:
    form = FORMATS[name]
    scheme = Scheme(4, 32, symmetric)
    modules = {
        f"model.layers.{i}.{part}": scheme
        for i in range(12)
        for part in ("self_attn.q_proj", "mlp.down_proj")
    }
    del modules["model.layers.1.mlp.down_proj"]
    config = form.quantization_config(
        ConfigRequest(modules, ["lm_head", "model.layers.1.mlp.down_proj"], scheme)
    )
    assert detect({"quantization_config": config}) == name
    for module in modules:
        found = form.scheme_of(module, config)
        assert found is not None and (found.bits, found.group_size) == (4, 32)
        assert name in ("awq", "turbomind") or found.symmetric == symmetric
    assert form.scheme_of("lm_head", config) is None
    assert form.scheme_of("model.layers.1.mlp.down_proj", config) is None


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "gptq_v2"])
def test_mixed_schemes(name: str) -> None:
    form = FORMATS[name]
    assert not form.shares_scheme("m")
    default, wide, channel = Scheme(4, 32, False), Scheme(8, 64, True), Scheme(3, -1, True)
    modules: dict[str, Scheme] = {}
    for i in range(12):
        modules |= {f"model.layers.{i}.self_attn.{part}_proj": default for part in "qkvo"}
        modules |= {
            f"model.layers.{i}.mlp.up_proj": default,
            f"model.layers.{i}.mlp.down_proj": wide,
        }
    for i in (3, 11):  # two of a family of which the rest has another scheme
        modules[f"model.layers.{i}.mlp.up_proj"] = channel
    modules["model.layers.1.self_attn.o_proj"] = channel  # and not that of layers 10 and 11
    config = form.quantization_config(
        ConfigRequest(modules, ["lm_head", "model.layers.0.mlp.gate_proj"], default)
    )
    assert {module: form.scheme_of(module, config) for module in modules} == modules
    assert form.scheme_of("model.layers.0.mlp.gate_proj", config) is None


def test_gptq_names_fused_modules_for_their_readers() -> None:
    default, wide = Scheme(4, 32, True), Scheme(8, 32, True)
    modules = {
        f"model.layers.{i}.self_attn.{part}_proj": default for i in range(3) for part in "qkvo"
    }
    modules |= {f"model.layers.1.self_attn.{part}_proj": wide for part in "qkv"}
    dynamic = FORMATS["gptq_v2"].quantization_config(ConfigRequest(modules, [], default))["dynamic"]
    assert set(dynamic) == {
        rf"+:^model\.layers\.1\.self_attn\.{part}_proj$" for part in ("q", "k", "v", "qkv")
    }


def test_awq_has_one_scheme_but_mixes_symmetry() -> None:
    form = FORMATS["awq"]
    modules = {"a.q_proj": Scheme(4, 32, True), "a.k_proj": Scheme(4, 32, False)}
    assert (
        form.quantization_config(ConfigRequest(modules, [], Scheme(4, 32, True)))["zero_point"]
        is True
    )
    with pytest.raises(FormatError, match=r"a\.k_proj: W4 g64"):
        form.quantization_config(
            ConfigRequest({**modules, "a.k_proj": Scheme(4, 64, True)}, [], Scheme(4, 32, True))
        )
    with pytest.raises(FormatError, match=r"would also ignore model\.mlp\.gate_proj"):
        form.quantization_config(
            ConfigRequest(
                {"model.mlp.gate_proj": Scheme(4, 32, True)},
                ["model.mlp.gate"],
                Scheme(4, 32, True),
            )
        )


@pytest.mark.parametrize("name", [*HELD, "huggingface"])
def test_what_a_tensor_must_be(name: str) -> None:
    form = FORMATS[name]
    scheme = Scheme(4, 32, True)
    good = random_tensor(32, 64, scheme)
    wrong = good.zeros.clone()
    wrong[3, 1] = 7
    spill = good.codes.clone()
    spill[5, 5] = 16
    nan = good.scales.clone()
    nan[0, 0] = float("nan")
    for tensor, message in (
        (
            IntegerTensor(scheme, good.codes, good.scales, wrong),
            "zeros: a symmetric scheme with a zero point other than 8",
        ),
        (
            IntegerTensor(scheme, spill, good.scales, good.zeros),
            "codes: a value of 16; expected at most 15",
        ),
        (IntegerTensor(scheme, good.codes, nan, good.zeros), "scales: NaN"),
        (
            IntegerTensor(scheme, good.codes, good.scales[:, :1], good.zeros),
            r"scales: shape \[32, 1\]; expected \[32, 2\]",
        ),
    ):
        with pytest.raises(FormatError, match=f"{MODULE} {message}"):
            form.encode(MODULE, tensor, torch.float16)


@pytest.mark.parametrize(
    ("name", "dtype", "value", "model_dtype"),
    [
        ("awq", torch.float32, 0.1, torch.float32),  # no fp16
        ("gptq", torch.float32, 1e-9, torch.float16),  # flushes to zero
        ("gptq_v2", torch.float32, 1e5, torch.bfloat16),  # overflows
        ("compressed-tensors", torch.float16, 1.0009765625, torch.bfloat16),  # too many digits
        ("compressed-tensors", torch.float32, 0.1, torch.bfloat16),
    ],
)
def test_inexact_scales_are_refused(
    name: str, dtype: torch.dtype, value: float, model_dtype: torch.dtype
) -> None:
    tensor = random_tensor(32, 64, Scheme(4, 32, True), dtype=torch.bfloat16)
    exact = (tensor.scales.float() * 2**-2).to(dtype)
    scales = exact.clone()
    scales[7, 1] = value
    form = FORMATS[name]
    form.encode(
        MODULE, IntegerTensor(tensor.scheme, tensor.codes, exact, tensor.zeros), model_dtype
    )
    with pytest.raises(
        FormatError, match=rf"{MODULE}\.(weight_scale|scales): 1 of 64 scales are no exact"
    ):
        form.encode(
            MODULE, IntegerTensor(tensor.scheme, tensor.codes, scales, tensor.zeros), model_dtype
        )


@pytest.mark.parametrize("name", INTEGER)
def test_checks_of_groups_and_ranks(name: str) -> None:
    form = FORMATS[name]

    def check(shape: tuple[int, int], group: int, **ranks: int) -> list[str]:
        return [
            str(problem)
            for problem in form.check(Weight(MODULE, shape, Scheme(4, group, True), **ranks))
        ]

    assert check((64, 256), 128) == []
    assert check((64, 256), -1) == []
    assert any(
        "172 input channels; expected a multiple of group_size 128. Use group_size 86 or -1" in p
        for p in check((64, 172), 128)
    )
    # 29568 = 231 groups of 128: one rank can hold it, two cannot
    assert check((64, 29568), 128) == []
    (straddling,) = check((64, 29568), 128, ranks=2, cut=1)
    assert (
        "14784 input channels on each of 2 ranks, so that a group straddles two of them"
        in straddling
    )
    # What is advised works: each of the sizes, and the padding.
    assert (
        "Use group_size 112, 64, 32, 16 or -1" in straddling
        and "padded with zeros to 29696" in straddling
    )
    held = (64, 32, -1) if name == "bitblas" else (112, 64, 32, 16, -1)
    assert [check((64, 29568), group, ranks=2, cut=1) for group in held] == [[]] * len(held)
    assert check((64, 29696), 128, ranks=2, cut=1) == []
    assert check((64, 29568), 128, ranks=2, cut=0) == []
    assert any(
        "66 output channels; expected a multiple of tp = 4" in p
        for p in check((66, 256), 128, ranks=4, cut=0)
    )


def test_checks_of_each_format() -> None:
    def check(
        name: str, shape: tuple[int, int], scheme: Scheme, index: bool = False, **ranks: int
    ) -> str:
        return "\n".join(
            map(str, FORMATS[name].check(Weight(MODULE, shape, scheme, index, **ranks)))
        )

    w4 = Scheme(4, 32, True)
    assert "4 bits, the only width of AWQ" in check("awq", (32, 64), Scheme(3, 32, True))
    assert "12 output channels; expected a multiple of 8" in check("awq", (12, 64), w4)
    assert "4 output channels; expected a multiple of 8" in check(
        "awq", (32, 64), w4, ranks=8, cut=0
    )
    assert "group index" in check("awq", (32, 64), w4, index=True)
    assert len(FORMATS["awq"].check(Weight("lm_head", (32, 64), w4))) == 1
    assert "8 output channels; expected a multiple of 32" in check(
        "gptq", (8, 64), Scheme(3, 32, True)
    )
    assert "20 input channels; expected a multiple of 8" in check(
        "gptq_v2", (32, 20), Scheme(4, 10, True)
    )
    assert check("gptq", (32, 64), w4, index=True) == ""
    assert "split along its inputs" in check("gptq", (32, 64), w4, index=True, ranks=2, cut=1)
    assert check("compressed-tensors", (5, 20), Scheme(3, 10, False)) == ""
    assert "group index" in check("compressed-tensors", (32, 64), w4, index=True)
    expert = "model.layers.0.mlp.experts.3.up_proj"
    assert FORMATS["compressed-tensors"].check(Weight(expert, (32, 64), w4)) == []
    assert (
        len(FORMATS["compressed-tensors"].check(Weight(expert, (32, 64), Scheme(4, 32, False))))
        == 1
    )


@pytest.mark.parametrize("name", INTEGER)
def test_broken_checkpoints_are_refused(name: str) -> None:
    form = FORMATS[name]
    scheme = Scheme(4, 32, False)
    tensor = random_tensor(32, 64, scheme, smallest_zero=1)
    config = form.quantization_config(ConfigRequest({MODULE: scheme}, [], scheme))
    encoded = form.encode(MODULE, tensor, torch.float16)
    for key in encoded:
        if key.endswith("g_idx"):
            continue  # may be absent where it says nothing
        with pytest.raises(FormatError, match=key):
            form.decode(MODULE, {k: v for k, v in encoded.items() if k != key}, config)
        with pytest.raises(FormatError, match=MODULE):
            form.decode(MODULE, encoded | {key: encoded[key][:-1].clone()}, config)
        wrong = torch.int16 if encoded[key].dtype == torch.int8 else torch.int8
        with pytest.raises(FormatError, match=key):
            form.decode(MODULE, encoded | {key: encoded[key].to(wrong)}, config)


def test_detect() -> None:
    assert detect({"model_type": "llama"}) is None
    assert detect({"quantization_config": {"quant_method": "gptq", "bits": 4}}) == "gptq"
    assert (
        detect({"quantization_config": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}})
        == "gptq_v2"
    )
    assert detect({"quantization_config": {"quant_method": "bitsandbytes"}}) == "bitsandbytes"
    for config in (
        {"quant_method": "huggingface"},
        {"quant_method": "gptq", "checkpoint_format": "marlin"},
        "awq",
    ):
        with pytest.raises(FormatError, match="quantization_config"):
            detect({"quantization_config": config})


def test_importing_the_formats_does_not_import_torch() -> None:
    code = "import sys, quantflow.formats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
