"""bitsandbytes' NF4: what its own classes read from our tensors and we from theirs, and every way
in which a checkpoint can be broken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantflow.errors import FormatError, ModelError
from quantflow.formats import FORMATS, detect
from quantflow.formats.base import ConfigRequest
from quantflow.formats.bitsandbytes import BLOCK_SIZES
from quantflow.formats.reader import Weights
from quantflow.formats.weight import Weight
from quantflow.pipeline.export import Options, export
from quantflow.quant.numbers.nf4 import NF4, NestedScales, Nf4Tensor, dynamic_table, quantize_nf4
from quantflow.quant.scheme import Scheme
from tests.helpers.tiny import write_llama

FORM = FORMATS["bitsandbytes"]
MODULE = "model.layers.0.self_attn.q_proj"
STATE = f"{MODULE}.weight.quant_state.bitsandbytes__nf4"
PLAIN, DOUBLE = Scheme(4, 64, True, "nf4"), Scheme(4, 64, True, "nf4", double=True)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def random_nf4(n: int, k: int, scheme: Scheme, seed: int = 0) -> Nf4Tensor:
    """Codes over their whole range, and scales of any kind, double ones with negatives among
    them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    groups = n * k // scheme.group_size
    if not scheme.double:
        return Nf4Tensor(scheme, codes, torch.rand(groups, generator=generator).view(n, -1))
    nested_codes = torch.randint(0, 256, (groups,), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(-(-groups // 256), generator=generator)
    nested = NestedScales(
        nested_codes, absmax, dynamic_table(), float(torch.rand((), generator=generator))
    )
    return Nf4Tensor(scheme, codes, nested.scales().view(n, -1), nested)


def assert_same(a: Any, b: Any) -> None:
    assert isinstance(a, Nf4Tensor) and isinstance(b, Nf4Tensor) and a.scheme == b.scheme
    assert a.codes.dtype == b.codes.dtype and torch.equal(a.codes, b.codes)
    assert a.scales.dtype == b.scales.dtype and torch.equal(a.scales, b.scales)
    assert (a.nested is None) == (b.nested is None)
    if a.nested and b.nested:
        assert a.nested.offset == b.nested.offset
        for x, y in (
            (a.nested.codes, b.nested.codes),
            (a.nested.absmax, b.nested.absmax),
            (a.nested.table, b.nested.table),
        ):
            assert x.dtype == y.dtype and torch.equal(x, y)


def config_of(scheme: Scheme) -> dict[str, Any]:
    return FORM.quantization_config(ConfigRequest({MODULE: scheme}, ["lm_head"], scheme))


schemes = st.builds(
    lambda group, double: Scheme(4, group, True, "nf4", double),
    st.sampled_from(BLOCK_SIZES[:4]),
    st.booleans(),
)


@settings(deadline=None, max_examples=60)
@given(
    schemes, st.integers(1, 9), st.integers(1, 4), st.integers(0, 10**6), st.sampled_from(DTYPES)
)
def test_round_trip(scheme: Scheme, n: int, k: int, seed: int, dtype: torch.dtype) -> None:
    tensor = random_nf4(n, k * scheme.group_size, scheme, seed)
    encoded = FORM.encode(MODULE, tensor, dtype)
    assert all(
        value.is_contiguous() and name.removeprefix(MODULE) in FORM.suffixes
        for name, value in encoded.items()
    )
    names = {torch.uint8: "U8", torch.float32: "F32"}
    found = {name: (names[value.dtype], tuple(value.shape)) for name, value in encoded.items()}
    assert list(FORM.specs(Weight(MODULE, tensor.shape, scheme), "float32").items()) == list(
        found.items()
    )
    assert_same(FORM.decode(MODULE, encoded, config_of(scheme)), tensor)


def read_by_hand(tensors: dict[str, Tensor]) -> list[list[float]]:
    """The weight as the format's description has it, one number at a time, in float64."""
    state = json.loads(bytes(tensors[STATE].tolist()))
    n, k = state["shape"]
    packed = tensors[f"{MODULE}.weight"].flatten().tolist()
    absmax = tensors[f"{MODULE}.weight.absmax"].tolist()
    if "nested_blocksize" in state:
        outer, table = (
            tensors[f"{MODULE}.weight.nested_{name}"].tolist() for name in ("absmax", "quant_map")
        )
        absmax = [
            table[code] * outer[i // state["nested_blocksize"]] + state["nested_offset"]
            for i, code in enumerate(absmax)
        ]
    quant_map, flat = tensors[f"{MODULE}.weight.quant_map"].tolist(), []
    for i in range(n * k):
        code = packed[i // 2] >> 4 if i % 2 == 0 else packed[i // 2] & 15
        flat.append(quant_map[code] * absmax[i // state["blocksize"]])
    return [flat[row * k : (row + 1) * k] for row in range(n)]


@pytest.mark.parametrize("scheme", [PLAIN, DOUBLE, Scheme(4, 32, True, "nf4", True)], ids=str)
def test_the_layout(scheme: Scheme) -> None:
    tensor = random_nf4(12, 128, scheme)
    encoded = FORM.encode(MODULE, tensor, torch.bfloat16)
    found = torch.tensor(read_by_hand(encoded), dtype=torch.float64)
    torch.testing.assert_close(found, tensor.dequantize(torch.float64), rtol=1e-6, atol=1e-6)
    state = json.loads(bytes(encoded[STATE].tolist()))
    assert (
        state["dtype"] == "bfloat16"
        and state["shape"] == [12, 128]
        and state["quant_type"] == "nf4"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "scheme",
    [PLAIN, DOUBLE, Scheme(4, 128, True, "nf4", True), Scheme(4, 1024, True, "nf4")],
    ids=str,
)
def test_bitsandbytes_reads_it(scheme: Scheme, dtype: torch.dtype) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    tensor = random_nf4(40, 1024, scheme)
    encoded = {
        name.removeprefix(f"{MODULE}."): value
        for name, value in FORM.encode(MODULE, tensor, dtype).items()
    }
    stored = encoded.pop("weight")
    parameter = bnb.nn.Params4bit.from_prequantized(stored, dict(encoded), device="cpu")
    state = bnb.functional.QuantState.from_dict(dict(encoded), torch.device("cpu"))
    for found in (parameter.quant_state, state):
        assert (found.dtype, tuple(found.shape), found.blocksize, found.nested) == (
            dtype,
            (40, 1024),
            scheme.group_size,
            scheme.double,
        )
        assert torch.equal(
            bnb.functional.dequantize_4bit(parameter.data, found), tensor.dequantize(dtype)
        )


@pytest.mark.parametrize(
    "storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str
)
@pytest.mark.parametrize("scheme", [PLAIN, DOUBLE, Scheme(4, 256, True, "nf4")], ids=str)
def test_what_bitsandbytes_writes_is_read(scheme: Scheme, storage: torch.dtype) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(48, 512, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    stored, state = bnb.functional.quantize_4bit(
        weight,
        blocksize=scheme.group_size,
        compress_statistics=scheme.double,
        quant_type="nf4",
        quant_storage=storage,
    )
    tensors = {f"{MODULE}.weight": stored} | {
        f"{MODULE}.weight.{name}": value for name, value in state.as_dict(packed=True).items()
    }
    config = config_of(scheme) | {"bnb_4bit_quant_storage": str(storage).removeprefix("torch.")}
    found = FORM.decode(MODULE, tensors, config)
    assert torch.equal(
        found.dequantize(torch.bfloat16), bnb.functional.dequantize_4bit(stored, state)
    )
    again = FORM.encode(MODULE, found, torch.bfloat16)
    assert torch.equal(again[f"{MODULE}.weight"].flatten(), stored.view(torch.uint8).flatten())
    assert all(
        torch.equal(again[name], value)
        for name, value in tensors.items()
        if name not in (f"{MODULE}.weight", STATE)
    )


# Configuration


@pytest.mark.parametrize("scheme", [PLAIN, DOUBLE, Scheme(4, 128, True, "nf4")], ids=str)
def test_the_configuration(scheme: Scheme) -> None:
    skipped = ["lm_head", "model.layers.1.mlp.down_proj"]
    config = FORM.quantization_config(ConfigRequest({MODULE: scheme}, skipped, scheme))
    assert detect({"quantization_config": config}) == "bitsandbytes"
    assert FORM.scheme_of(MODULE, config) == scheme
    assert [FORM.scheme_of(name, config) for name in skipped] == [None, None]
    assert FORM.scheme_of("model.layers.11.mlp.down_proj", config) == scheme
    json.dumps(config)
    with pytest.raises(FormatError, match="one scheme"):
        FORM.quantization_config(ConfigRequest({"a": PLAIN, "b": DOUBLE}, [], PLAIN))
    with pytest.raises(FormatError, match="KV"):
        FORM.quantization_config(ConfigRequest({MODULE: scheme}, [], scheme, kv_scales="fp8"))


def test_the_configuration_is_transformers_own() -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = config_of(DOUBLE)
    theirs = BitsAndBytesConfig.from_dict(config)
    assert (
        theirs.load_in_4bit
        and theirs.bnb_4bit_quant_type == "nf4"
        and theirs.bnb_4bit_use_double_quant
    )
    written = theirs.to_dict()
    assert {key: written[key] for key in config} == config
    assert FORM.scheme_of(MODULE, written) == DOUBLE


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"load_in_4bit": False, "load_in_8bit": True},
            "load_in_4bit: false; expected true: 8-bit",
        ),
        ({"load_in_4bit": "yes"}, "load_in_4bit: 'yes'"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type: 'fp4'"),
        ({"bnb_4bit_quant_type": None}, "bnb_4bit_quant_type: None"),
        ({"bnb_4bit_quant_type": ["nf4"]}, "bnb_4bit_quant_type"),
        ({"bnb_4bit_use_double_quant": 1}, "bnb_4bit_use_double_quant: 1"),
        ({"bnb_4bit_blocksize": "64"}, "bnb_4bit_blocksize: '64'"),
        ({"bnb_4bit_blocksize": -1}, "bnb_4bit_blocksize: -1; expected one of 32"),
        ({"bnb_4bit_blocksize": 0}, "bnb_4bit_blocksize: 0"),
        ({"llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules: 'lm_head'"),
        ({"bnb_4bit_quant_storage": "int64"}, "bnb_4bit_quant_storage: 'int64'"),
        ({"bnb_4bit_quant_storage": 8}, "bnb_4bit_quant_storage: 8"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, rf"{MODULE}\.weight: torch.uint8"),
        (
            {"bnb_4bit_use_double_quant": True},
            rf"{STATE}: blocks of 64; expected NF4 g64 double, says quantization_config",
        ),
        ({"bnb_4bit_blocksize": 128}, rf"{STATE}: blocks of 64; expected NF4 g128"),
        ({"llm_int8_skip_modules": ["q_proj"]}, f"{MODULE}: not quantised"),
    ],
    ids=str,
)
def test_wrong_configurations(change: dict[str, Any], complaint: str) -> None:
    encoded = FORM.encode(MODULE, random_nf4(8, 128, PLAIN), torch.float16)
    with pytest.raises(FormatError, match=complaint):
        FORM.decode(MODULE, encoded, config_of(PLAIN) | change)


def test_a_double_state_of_a_single_configuration() -> None:
    encoded = FORM.encode(MODULE, random_nf4(8, 128, DOUBLE), torch.float16)
    with pytest.raises(
        FormatError,
        match=f"{STATE}: blocks of 64, double; expected NF4 g64, says .*bnb_4bit_use_double_quant",
    ):
        FORM.decode(MODULE, encoded, config_of(PLAIN))


# Broken tensors


@pytest.mark.parametrize("scheme", [PLAIN, DOUBLE], ids=str)
def test_each_tensor_is_missed_and_checked(scheme: Scheme) -> None:
    encoded = FORM.encode(MODULE, random_nf4(8, 128, scheme), torch.float16)
    assert len(encoded) == (6 if scheme.double else 4)
    for key, value in encoded.items():
        with pytest.raises(FormatError, match=f"{key}: missing"):
            FORM.decode(MODULE, {k: v for k, v in encoded.items() if k != key}, config_of(scheme))
        for wrong in (
            value[:-1].clone(),
            torch.cat([value, value[:1]]),
            value[None],
            value.to(torch.int8),
            value.double(),
            value[:0],
        ):
            if (
                key == STATE
                and wrong.dtype == torch.uint8
                and wrong.dim() == 1
                and len(wrong) == 223
            ):
                continue  # a blank less at the end
            with pytest.raises(FormatError, match=key):
                FORM.decode(MODULE, encoded | {key: wrong}, config_of(scheme))
    swapped = {f"{MODULE}.weight.quant_map": torch.tensor(NF4).flip(0)}
    with pytest.raises(FormatError, match="quant_map: another table"):
        FORM.decode(MODULE, encoded | swapped, config_of(scheme))


GOOD: dict[str, Any] = {
    "quant_type": "nf4",
    "blocksize": 64,
    "dtype": "float16",
    "shape": [8, 128],
    "nested_blocksize": 256,
    "nested_dtype": "float32",
    "nested_offset": 0.5,
}


def state_of(**changes: Any) -> bytes:
    return json.dumps(
        {key: value for key, value in (GOOD | changes).items() if value != "gone"}
    ).encode()


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b" ",
        b"{",
        b"\xff\xfe{}",
        b"[]",
        b"7",
        b"null",
        b'"nf4"',
        b"{}",
        b"[" * 3000,
        b"1" * 4090,
        b" " * 5000 + state_of(),
        state_of(shape=[8]),
        state_of(shape=[8, 128, 1]),
        state_of(shape=[2**40, 2**40]),
        state_of(shape=[-8, -128]),
        state_of(shape=[0, 128]),
        state_of(shape=[8.0, 128.0]),
        state_of(shape=[True, 128]),
        state_of(shape="8x128"),
        state_of(shape=None),
        state_of(shape="gone"),
        state_of(shape=[128, 8]),
        state_of(shape=[8, 64]),
        state_of(shape=[8, 2**31 - 64]),
        state_of(blocksize=-64),
        state_of(blocksize=0),
        state_of(blocksize=63),
        state_of(blocksize="64"),
        state_of(blocksize="gone"),
        state_of(blocksize=10**30),
        state_of(quant_type="fp4"),
        state_of(quant_type=None),
        state_of(quant_type="gone"),
        state_of(nested_offset=float("nan")),
        state_of(nested_offset=float("inf")),
        state_of(nested_offset="0.5"),
        state_of(nested_offset=None),
        state_of(nested_offset=True),
        state_of(nested_offset=10**400),
        state_of(nested_blocksize=64),
        state_of(nested_blocksize=None),
        state_of(nested_blocksize="gone"),
    ],
    ids=lambda blob: blob[:60].decode("latin1"),
)
def test_broken_states(blob: bytes) -> None:
    encoded = FORM.encode(MODULE, random_nf4(8, 128, DOUBLE), torch.float16)
    FORM.decode(
        MODULE,
        encoded | {STATE: torch.tensor(list(state_of()), dtype=torch.uint8)},
        config_of(DOUBLE),
    )
    with pytest.raises(FormatError, match=MODULE):
        FORM.decode(
            MODULE,
            encoded | {STATE: torch.tensor(list(blob), dtype=torch.uint8)},
            config_of(DOUBLE),
        )


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60), st.integers(0, 200), st.integers(0, 60))
def test_a_damaged_state_is_read_or_refused(noise: bytes, at: int, cut: int) -> None:
    encoded = FORM.encode(MODULE, random_nf4(8, 128, DOUBLE), torch.float16)
    blob = state_of()
    blob = blob[:at] + noise + blob[at + cut :]
    try:
        found = FORM.decode(
            MODULE,
            encoded | {STATE: torch.tensor(list(blob), dtype=torch.uint8)},
            config_of(DOUBLE),
        )
    except FormatError as error:
        assert MODULE in str(error)
    else:
        assert found.shape == (8, 128)


def test_blocks_that_run_into_the_next_row_are_refused() -> None:
    """bitsandbytes writes them: its blocks know no rows."""
    bnb = pytest.importorskip("bitsandbytes")
    stored, state = bnb.functional.quantize_4bit(torch.randn(8, 96), quant_type="nf4")
    tensors = {f"{MODULE}.weight": stored} | {
        f"{MODULE}.weight.{name}": value for name, value in state.as_dict(packed=True).items()
    }
    with pytest.raises(
        FormatError, match=f"{STATE}: 96 input channels; expected a multiple of the blocks of 64"
    ):
        FORM.decode(MODULE, tensors, config_of(PLAIN))


def test_what_is_not_written() -> None:
    def check(shape: tuple[int, int], scheme: Scheme, module: str = MODULE) -> str:
        return "\n".join(map(str, FORM.check(Weight(module, shape, scheme))))

    assert check((64, 128), PLAIN) == check((7, 64), DOUBLE) == ""
    assert "96 input channels; expected a multiple of the blocks of 64. Ignore" in check(
        (64, 96), PLAIN
    )
    assert "blocks of 48; expected one of 32" in check((64, 96), Scheme(4, 48, True, "nf4"))
    assert (
        "W4 g64 symmetric, a grid with integer zero points; expected a grid of NF4's table"
        in check((64, 128), Scheme(4, 64, True))
    )
    assert not FORM.parallel
    assert "an expert of a mixture" in check(
        (64, 128), PLAIN, "model.layers.0.mlp.experts.3.up_proj"
    )
    for shape, scheme in (
        ((64, 128), Scheme(4, 128, False)),
        ((64, 128), Scheme(8, -1, True)),
        ((64, 128), PLAIN),
        ((64, 128), DOUBLE),
    ):
        nearest = FORM.nearest(Weight("m", shape, scheme))
        assert (
            nearest.kind == "nf4"
            and check(shape, nearest) == ""
            and (nearest == scheme) == (scheme.kind == "nf4")
        )


def test_what_a_tensor_must_be() -> None:
    good, double = random_nf4(8, 128, PLAIN), random_nf4(8, 128, DOUBLE)
    spilt, infinite = good.codes.clone(), good.scales.clone()
    spilt[3, 3], infinite[1, 1] = 16, float("inf")
    other = replace(double, scales=double.scales * 2)
    for tensor, complaint in (
        (replace(good, codes=spilt), "codes: a value of 16"),
        (replace(good, scales=infinite), "scales: NaN or infinity"),
        (replace(good, scales=good.scales[:, :1]), r"scales: shape \[8, 1\]"),
        (replace(good, scheme=DOUBLE), "scales: others than the nested"),
        (replace(double, scheme=PLAIN), "scales: others than the nested"),
        (other, "scales: others than the nested"),
        # their mean is past float32's range
        (quantize_nf4(torch.full((8, 128), 3e38), DOUBLE), "scales: NaN or infinity"),
    ):
        with pytest.raises(FormatError, match=f"{MODULE} {complaint}"):
            FORM.encode(MODULE, tensor, torch.float32)


# Whole checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bnb")
    write_llama(root / "model", intermediate_size=128)
    export(root / "model", "bitsandbytes", root / "nf4", Options(requantize=True))
    return root / "nf4"


def broken(checkpoint: Path, folder: Path, change: Any, **config: Any) -> Path:
    """A copy with `change` made to its tensors, and `config` to its quantization_config."""
    folder.mkdir()
    tensors, content = (
        load_file(checkpoint / "model.safetensors"),
        json.loads((checkpoint / "config.json").read_text()),
    )
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    content["quantization_config"] |= config
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def read(folder: Path) -> None:
    weights = Weights(folder)
    for module in sorted(weights.modules):
        weights.quantized(module)


def test_a_checkpoint_is_read(checkpoint: Path, tmp_path: Path) -> None:
    weights = Weights(checkpoint)
    assert len(weights.modules) == 14 and weights.scheme_of(MODULE) == PLAIN
    source = load_file(checkpoint.parent / "model" / "model.safetensors")
    for module in weights.modules:
        assert torch.equal(
            weights.tensor(f"{module}.weight"),
            quantize_nf4(source[f"{module}.weight"], PLAIN).dequantize(),
        )
    read(broken(checkpoint, tmp_path / "same", lambda tensors: None))


def rename(old: str, new: str) -> Any:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(old)]:
            tensors[name.removesuffix(old) + new] = tensors.pop(name)

    return change


def eight_bits(tensors: dict[str, Tensor]) -> None:
    """As bitsandbytes' int8 checkpoints are laid out."""
    for state in [n for n in tensors if n.endswith("__nf4")]:
        module = state.partition(".weight.")[0]
        shape = json.loads(bytes(tensors[state].tolist()))["shape"]
        for name in [n for n in tensors if n.startswith(f"{module}.weight")]:
            del tensors[name]
        tensors |= {
            f"{module}.weight": torch.zeros(shape, dtype=torch.int8),
            f"{module}.SCB": torch.ones(shape[0]),
        }
        tensors[f"{module}.weight_format"] = torch.tensor(0, dtype=torch.uint8)


def nan(tensors: dict[str, Tensor]) -> None:
    tensors[f"{MODULE}.weight.absmax"][3] = float("nan")


def other_shape(tensors: dict[str, Tensor]) -> None:
    """A state that is whole, of another weight."""
    other = "model.layers.0.mlp.up_proj"
    for name in [n for n in tensors if n.startswith(f"{MODULE}.")]:
        tensors[name] = tensors[name.replace(MODULE, other)].clone()


@pytest.mark.parametrize(
    ("change", "config", "complaint"),
    [
        (
            rename("__nf4", "__fp4"),
            {"bnb_4bit_quant_type": "fp4"},
            "bnb_4bit_quant_type: 'fp4'; expected 'nf4'",
        ),
        (rename("__nf4", "__fp4"), {}, "bitsandbytes__nf4: missing"),
        (
            eight_bits,
            {"load_in_4bit": False, "load_in_8bit": True},
            r"INT8 weights of bitsandbytes \(load_in_8bit\)",
        ),
        (eight_bits, {}, "bitsandbytes__nf4: missing"),
        (nan, {}, f"{MODULE}: scales that are NaN"),
        (other_shape, {}, rf"{MODULE}: shape \[128, 64\]; expected \[64, 64\]"),
        (lambda tensors: tensors.pop(f"{MODULE}.weight"), {}, f"{MODULE}.weight: missing"),
        (
            lambda tensors: tensors.pop(f"{MODULE}.weight.absmax"),
            {},
            f"{MODULE}.weight.absmax: missing",
        ),
        (lambda tensors: tensors.pop(STATE), {}, MODULE),
        (lambda tensors: None, {"bnb_4bit_use_double_quant": True}, "says quantization_config"),
        (
            lambda tensors: None,
            {"llm_int8_skip_modules": ["lm_head", "q_proj"]},
            "q_proj: packed tensors, and a quantization_config that leaves it alone",
        ),
    ],
    ids=[
        "fp4",
        "fp4_unsaid",
        "int8",
        "int8_unsaid",
        "nan",
        "other_shape",
        "no_weight",
        "no_absmax",
        "no_state",
        "double",
        "skipped",
    ],
)
def test_damaged_checkpoints_are_refused(
    checkpoint: Path, tmp_path: Path, change: Any, config: dict[str, Any], complaint: str
) -> None:
    with pytest.raises((FormatError, ModelError), match=complaint):
        read(broken(checkpoint, tmp_path / "broken", change, **config))
