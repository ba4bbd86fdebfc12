"""Plain checkpoints: float32 holds what codes stand for; 16 bits hold it where it happens to fit,
or rounded, where that is asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from quantflow.errors import FormatError
from quantflow.formats import FORMATS
from quantflow.formats.huggingface import HuggingFace
from quantflow.formats.reader import Weights
from quantflow.formats.weight import Weight
from quantflow.pipeline.export import Options, export
from quantflow.quant.numbers import QuantizedTensor
from quantflow.quant.numbers.integer import IntegerTensor
from quantflow.quant.numbers.minimum import MinimumTensor
from quantflow.quant.numbers.nf4 import Nf4Tensor, quantize_nf4
from quantflow.quant.scheme import Scheme
from tests.formats.helpers import random_tensor
from tests.helpers import zoo
from tests.helpers.runs import Bench, invoke, make_bench

MODULE = "model.layers.0.self_attn.q_proj"
WEIGHT = f"{MODULE}.weight"
HALVES = ("float16", "bfloat16")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_minimums(n: int, k: int, seed: int) -> MinimumTensor:
    codes = random_tensor(n, k, Scheme(4, 32, False), seed=seed).codes
    scales, minimums = (random(n, k // 32, seed=seed + i).half() for i in (1, 2))
    return MinimumTensor(Scheme(4, 32, False, "minimum"), codes, scales, minimums)


def of_every_kind(seed: int) -> list[QuantizedTensor]:
    scheme = Scheme(4, 64, True, "nf4")
    integer = (
        random_tensor(8, 128, Scheme(bits, 32, symmetric), seed=seed)
        for bits in (2, 3, 4, 8)
        for symmetric in (False, True)
    )
    indexed = random_tensor(8, 128, Scheme(4, 32, False), seed=seed, index=True)
    nf4 = (
        quantize_nf4(random(8, 128, seed=seed), replace(scheme, double=double))
        for double in (False, True)
    )
    return [*integer, indexed, with_minimums(8, 128, seed), *nf4]


def by_hand(tensor: QuantizedTensor, row: int, column: int) -> float:
    """One weight in float64."""
    group = column // (tensor.shape[1] // tensor.scales.shape[1])
    if isinstance(tensor, IntegerTensor) and tensor.group_index is not None:
        group = int(tensor.group_index[column])
    code, scale = int(tensor.codes[row, column]), float(tensor.scales[row, group])
    if isinstance(tensor, IntegerTensor):
        return (code - int(tensor.zeros[row, group])) * scale
    if isinstance(tensor, MinimumTensor):
        return code * scale + float(tensor.minimums[row, group])
    return [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ][code] * scale


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10**6))
def test_float32_is_what_codes_stand_for(seed: int) -> None:
    form = FORMATS["huggingface"]
    for tensor in of_every_kind(seed):
        assert form.check(Weight(MODULE, tensor.shape, tensor.scheme, indexed=True)) == []
        encoded = form.encode(MODULE, tensor, torch.bfloat16)
        assert form.specs(Weight(MODULE, tensor.shape, tensor.scheme), "float32") == {
            WEIGHT: ("F32", tensor.shape)
        }
        assert list(encoded) == [WEIGHT] and encoded[WEIGHT].dtype == torch.float32
        assert torch.equal(encoded[WEIGHT], tensor.dequantize())
        for row, column in ((0, 0), (3, 50), (7, 127)):
            exact = by_hand(tensor, row, column)
            largest = float(tensor.dequantize().abs().max())  # a minimum may cancel the rest
            assert abs(float(encoded[WEIGHT][row, column]) - exact) <= largest * 2**-22


def powers_of_two(n: int, k: int, seed: int, *, least: int = -6) -> IntegerTensor:
    """Integers of 4 bits times powers of two: they fit into 16 bits."""
    tensor = random_tensor(n, k, Scheme(4, 32, False), seed=seed)
    exponents = torch.randint(
        least, 3, tensor.scales.shape, generator=torch.Generator().manual_seed(seed)
    )
    return replace(tensor, scales=torch.exp2(exponents.float()))


@pytest.mark.parametrize("dtype", HALVES)
def test_16_bits_hold_what_fits(dtype: str) -> None:
    tensor = powers_of_two(8, 128, 1)
    encoded = HuggingFace(dtype=dtype).encode(MODULE, tensor, torch.float32)
    assert encoded[WEIGHT].dtype == getattr(torch, dtype) and torch.equal(
        encoded[WEIGHT].double(), tensor.dequantize(torch.float64)
    )
    own = HuggingFace(dtype=None)  # the model's
    assert own.scale_dtype(dtype) == dtype
    assert torch.equal(own.encode(MODULE, tensor, getattr(torch, dtype))[WEIGHT], encoded[WEIGHT])


@pytest.mark.parametrize("dtype", HALVES)
def test_16_bits_refuse_the_rest_unless_it_may_be_rounded(dtype: str) -> None:
    one = powers_of_two(8, 128, 1)
    scales, codes = one.scales.clone(), one.codes.clone()
    scales[2, 1] = 1 + 2**-12
    codes[2, 32:64], one.zeros[2, 1] = 3, 3
    codes[2, 40] = 4
    one = replace(one, scales=scales, codes=codes)
    with pytest.raises(
        FormatError,
        match=(
            f"{WEIGHT}: 1 of 1024 weights are no exact {dtype}; expected numbers that fit.*float32"
        ),
    ):
        HuggingFace(dtype=dtype).encode(MODULE, one, torch.float32)
    rounded = HuggingFace(dtype=dtype, rounded=True).encode(MODULE, one, torch.float32)[WEIGHT]
    assert (
        torch.equal(rounded, one.dequantize().to(getattr(torch, dtype)))
        and float(rounded[2, 40]) == 1.0
    )
    for tensor in of_every_kind(3):
        with pytest.raises(FormatError, match=WEIGHT):
            HuggingFace(dtype="bfloat16").encode(MODULE, tensor, torch.float32)


@pytest.mark.parametrize("rounded", [False, True])
def test_infinities_are_never_written(rounded: bool) -> None:
    large = Nf4Tensor(
        Scheme(4, 64, True, "nf4"),
        torch.full((2, 64), 15, dtype=torch.uint8),
        torch.tensor([[65504.0], [131072.0]]),
    )
    with pytest.raises(
        FormatError,
        match=(
            rf"{WEIGHT}: 64 of 128 weights are beyond the range of float16; .* Use --dtype float32$"
        ),
    ):
        HuggingFace(dtype="float16", rounded=rounded).encode(MODULE, large, torch.float32)
    assert (
        HuggingFace(dtype="bfloat16", rounded=True).encode(MODULE, large, torch.float32)[WEIGHT][
            1, 0
        ]
        == 131072
    )
    huge = IntegerTensor(
        Scheme(8, 4, False),
        torch.full((1, 4), 255, dtype=torch.uint8),
        torch.tensor([[3e38]]),
        torch.zeros(1, 1, dtype=torch.uint8),
    )
    with pytest.raises(
        FormatError,
        match=(
            f"{WEIGHT}: 4 of 4 weights are beyond the range of float32; expected numbers that fit$"
        ),
    ):
        HuggingFace(dtype="float32", rounded=rounded).encode(MODULE, huge, torch.float32)


@pytest.mark.parametrize("dtype", HALVES)
def test_numbers_too_small_are_not_lost_unasked(dtype: str) -> None:
    tensor = powers_of_two(8, 128, 1)
    tensor = replace(tensor, scales=tensor.scales * 2.0**-140)
    with pytest.raises(FormatError, match=WEIGHT):
        HuggingFace(dtype=dtype).encode(MODULE, tensor, torch.float32)


# Whole checkpoints

STAGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "W4 asymmetric": ("rtn", {"bits": 4, "group_size": 32}),
    "W3 symmetric": ("rtn", {"bits": 3, "group_size": 64, "symmetric": True}),
    "NF4": ({"nf4": {"double_quant": True}}, {}),
}


@pytest.fixture(scope="module", params=sorted(STAGES))
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Artifacts of several grids, in bfloat16 where they are not quantised."""
    stage, weights = STAGES[request.param]
    bench = make_bench(tmp_path_factory.mktemp("plain"), intermediate_size=128)
    form = "bitsandbytes" if request.param == "NF4" else "compressed-tensors"
    result = invoke(
        "run", bench.recipe(stages=[stage, {"pack": {"format": form}}], weights=weights)
    )
    assert result.exit_code == 0, result.output
    return bench


def test_transformers_computes_the_decoders_logits(bench: Bench, tmp_path: Path) -> None:
    """Its weights are ours bit for bit. Two implementations of a decoder agree to float32's
    accuracy only: attention and norms are summed in other orders."""
    export(bench.output, "huggingface", tmp_path / "plain")
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    source = Weights(bench.output)
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.tensor(name).float()), name
    tokens = zoo.random_tokens(2, 24)
    with torch.inference_mode():
        found = model(tokens).logits
    torch.testing.assert_close(found, zoo.decoder_logits(source, tokens), rtol=1e-4, atol=1e-5)
    assert torch.equal(
        zoo.decoder_logits(Weights(tmp_path / "plain"), tokens), zoo.decoder_logits(source, tokens)
    )


def test_what_an_export_says(bench: Bench, tmp_path: Path) -> None:
    done = export(bench.output, "huggingface", tmp_path / "plain")
    assert (done.errors, done.modules) == ({}, 14) and not (
        tmp_path / "plain/requantized.json"
    ).exists()
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert (
        "quantization_config" not in config
        and config["torch_dtype"] == "float32"
        and "dtype" not in config
    )
    stored = load_file(tmp_path / "plain/model.safetensors")
    assert {stored[name].dtype for name in (WEIGHT, "lm_head.weight")} == {
        torch.float32,
        torch.bfloat16,
    }
    assert Weights(tmp_path / "plain").format is None


@pytest.mark.parametrize("dtype", HALVES)
def test_16_bit_exports(bench: Bench, tmp_path: Path, dtype: str) -> None:
    if dtype == "float16" and Weights(bench.output).scheme_of(MODULE) == Scheme(3, 64, True):
        # Scales of 8 bits, which bfloat16 holds, times integers of 3: float16 holds all 11.
        done = export(bench.output, "huggingface", tmp_path / "exact", Options(dtype=dtype))
        assert (
            done.errors == {} and Weights(tmp_path / "exact").tensor(WEIGHT).dtype == torch.float16
        )
        assert torch.equal(
            Weights(tmp_path / "exact").tensor(WEIGHT).float(), Weights(bench.output).tensor(WEIGHT)
        )
        return
    with pytest.raises(FormatError, match=f"weights are no exact {dtype}"):
        export(bench.output, "huggingface", tmp_path / "no", Options(dtype=dtype))
    assert not (tmp_path / "no").exists()
    done = export(
        bench.output, "huggingface", tmp_path / "rounded", Options(dtype=dtype, requantize=True)
    )
    assert set(done.errors) == {
        name.removesuffix(".weight")
        for name in load_file(tmp_path / "rounded/model.safetensors")
        if "proj" in name
    }
    record = json.loads((tmp_path / "rounded/requantized.json").read_text())
    assert (
        record["relative_errors"] == dict(done.errors)
        and 0 < max(done.errors.values()) < torch.finfo(getattr(torch, dtype)).eps
    )
    source, rounded = Weights(bench.output), Weights(tmp_path / "rounded")
    for module in source.modules:
        assert torch.equal(
            rounded.tensor(f"{module}.weight"),
            source.tensor(f"{module}.weight").to(getattr(torch, dtype)),
        )
