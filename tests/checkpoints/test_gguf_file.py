"""GGUF files read and written here, against the gguf package and transformers, and against files
made byte by byte."""

from __future__ import annotations

import json
import math
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.checkpoints.gguf.file import Gguf
from quantflow.checkpoints.gguf.names import to_gguf_name
from quantflow.checkpoints.gguf.superblocks import SUPERBLOCK_TYPES, dequantize_superblocks
from quantflow.checkpoints.gguf.writer import GgufWriter, decoder_problems
from quantflow.errors import FormatError, ModelError
from quantflow.formats.gguf import Gguf as Blocks
from quantflow.formats.reader import Weights
from quantflow.quant.scheme import Scheme
from tests.formats.helpers import random_tensor
from tests.helpers.zoo import specimen, write

gguf = pytest.importorskip("gguf")

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}
NUMPY = {torch.float32: np.float32, torch.float16: np.float16}


def write_file(path: Path, source: Path, tensors: dict[str, Tensor], **metadata: Any) -> Path:
    checkpoint = Checkpoint(source)
    specs = {name: (NAMES[value.dtype], tuple(value.shape)) for name, value in tensors.items()}
    with GgufWriter(path, specs, checkpoint.raw_config, checkpoint.config, metadata) as writer:
        for name in reversed(specs):
            writer.write(name, tensors[name])
    return path


def with_blocks(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Scheme]]:
    """q_proj in Q4_0, down_proj in Q8_0 and v_proj in Q4_1, in every layer."""
    found, schemes = {}, {}
    kinds = {
        "q_proj": Scheme(4, 32, True),
        "down_proj": Scheme(8, 32, True),
        "v_proj": Scheme(4, 32, False, "minimum"),
    }
    for name, value in tensors.items():
        module, _, part = name.rpartition(".")
        scheme = kinds.get(module.rpartition(".")[2])
        if scheme is None or part != "weight":
            found[name] = value
            continue
        schemes[module] = scheme
        tensor: Any = random_tensor(*value.shape, scheme, seed=len(schemes))
        if scheme.kind == "minimum":
            from quantflow.quant.numbers.minimum import MinimumTensor

            tensor = MinimumTensor(scheme, tensor.codes, tensor.scales, -tensor.scales * 3)
        found |= Blocks().encode(module, tensor, torch.float16)
    return found, schemes


def as_stored(reader_tensor: Any) -> Tensor:
    """What the package gives of a tensor, BF16 as its 16 bits."""
    data = torch.from_numpy(np.array(reader_tensor.data))
    return (
        data.view(torch.bfloat16).view(*data.shape[:-1], -1)
        if reader_tensor.tensor_type.name == "BF16"
        else data
    )


def permuted_as_the_converter_does(rows: Tensor, heads: int) -> Tensor:
    """Channels i and i + D/2 of a head, which turn together, come to lie side by side."""
    size = len(rows) // heads
    out = torch.empty_like(rows)
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = rows[head * size + i]
            out[head * size + 2 * i + 1] = rows[head * size + i + size // 2]
    return out


# --- writing


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["llama3", "llama_bias", "mistral", "qwen2", "qwen3"])
def test_the_package_reads_what_we_write(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    found = specimen(name, dtype)
    source = write(tmp_path / "source", found)
    tensors, schemes = with_blocks(found.tensors)
    said = {
        "general.name": "ß 日本",
        "tokenizer.ggml.tokens": ["a", "\udcff", ""],
        "x.flag": True,
        "x.list": [1, -2],
        "x.f": [0.5, 2.0],
    }
    path = write_file(tmp_path / "model.gguf", source, tensors, **said)
    theirs = gguf.GGUFReader(path)
    by_name = {tensor.name: tensor for tensor in theirs.tensors}
    rotary = name in ("llama3", "llama_bias", "mistral")
    assert len(by_name) == len(tensors) + (name == "llama3")
    for ours, value in tensors.items():
        module, _, part = ours.rpartition(".")
        tensor = by_name[f"{to_gguf_name(module)}.{'bias' if part == 'bias' else 'weight'}"]
        kind = (
            part.upper()
            if value.dtype == torch.uint8
            else "F32"
            if value.dim() == 1
            else NAMES[value.dtype]
        )
        assert tensor.tensor_type.name == kind and tensor.data_offset % 32 == 0
        if value.dtype != torch.uint8:
            assert tuple(tensor.shape[::-1]) == tuple(value.shape)
        if rotary and ".self_attn.q_proj" in ours:
            value = permuted_as_the_converter_does(value, 4)
        if rotary and ".self_attn.k_proj" in ours:
            value = permuted_as_the_converter_does(value, 2)
        assert torch.equal(as_stored(tensor), value.float() if value.dim() == 1 else value), ours

    # The package cannot read the token that is no UTF-8.
    values = {
        key: field.contents()
        for key, field in theirs.fields.items()
        if key != "tokenizer.ggml.tokens"
    }
    config, architecture = (
        found.config,
        {"llama3": "llama", "llama_bias": "llama", "mistral": "llama"}.get(name, name),
    )
    head = config.get("head_dim", 16)
    expected = {
        "block_count": 2,
        "context_length": config["max_position_embeddings"],
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": head,
        "rope.freq_base": config["rope_theta"],
        "vocab_size": 320,
        "attention.layer_norm_rms_epsilon": np.float32(config["rms_norm_eps"]),
    }
    assert values["general.architecture"] == architecture and values["general.name"] == "ß 日本"
    assert {key: values[f"{architecture}.{key}"] for key in expected} == expected
    assert values["x.flag"] is True and values["x.list"] == [1, -2] and values["x.f"] == [0.5, 2.0]
    assert json.loads(values["quantflow.config"]) == config

    ours = Gguf(path)
    assert set(ours.tensors) == set(tensors)
    for key, value in tensors.items():
        assert torch.equal(ours.read(key), value.float() if value.dim() == 1 else value), key
    assert ours.metadata["tokenizer.ggml.tokens"] == said["tokenizer.ggml.tokens"]
    kinds = {"q_proj": "q4_0", "v_proj": "q4_1", "down_proj": "q8_0"}
    assert ours.config.pop("quantization_config")["types"] == {
        module: kinds[module.rpartition(".")[2]] for module in schemes
    }
    assert ours.config == config


def test_the_writer_checks(tmp_path: Path) -> None:
    found = specimen("qwen3")
    source = write(tmp_path / "source", found)
    checkpoint = Checkpoint(source)
    specs = {name: ("F32", tuple(value.shape)) for name, value in found.tensors.items()}
    name = next(iter(specs))
    norm = found.tensors["model.norm.weight"]
    writer = GgufWriter(tmp_path / "a.gguf", specs, checkpoint.raw_config, checkpoint.config, {})
    with pytest.raises(ValueError, match="never written"), writer:
        writer.write(name, found.tensors[name])
        for again, wrong in (
            (name, found.tensors[name]),
            ("model.norm.weight", norm[:1]),
            ("model.norm.weight", norm.half()),
        ):
            with pytest.raises(ValueError, match="announced"):
                writer.write(again, wrong)
    with pytest.raises(FormatError, match="dtype I64"):
        GgufWriter(
            tmp_path / "a.gguf",
            specs | {"model.norm.weight": ("I64", (1, 1))},
            checkpoint.raw_config,
            checkpoint.config,
            {},
        )
    with pytest.raises(KeyError):
        to_gguf_name("model.layers.0.mlp.gate")


def test_what_llama_cpp_does_not_compute_is_named(tmp_path: Path) -> None:
    def problems(name: str, **changes: Any) -> str:
        found = specimen(name)
        source = write(tmp_path / name, type(found)(found.config | changes, found.tensors))
        checkpoint = Checkpoint(source)
        native = checkpoint.architecture.native_config(checkpoint.raw_config)
        return "\n".join(map(str, decoder_problems(str(native["model_type"]), checkpoint.config)))

    for name in ("llama3", "llama_bias", "qwen3"):
        assert problems(name) == ""
    assert (
        "sliding window" in problems("mistral") and problems("mistral", sliding_window=None) == ""
    )
    assert (
        "sliding window" in problems("qwen2") and problems("qwen2", use_sliding_window=False) == ""
    )
    assert "mixture of experts" in problems("mixtral") and "activation gelu" in problems(
        "llama_bias", hidden_act="gelu"
    )
    # dynamic scaling and logn begin beyond the trained length
    assert problems("internlm") == problems("qwen") == ""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert problems("llama_bias", rope_scaling=yarn) == ""
    assert problems("llama_bias", rope_scaling=yarn | {"beta_fast": 32, "beta_slow": 1}) == ""
    assert "yarn with" in problems("llama_bias", rope_scaling=yarn | {"beta_fast": 16})
    assert "yarn with" in problems("llama_bias", rope_scaling=yarn | {"attention_factor": 1.5})


# --- rotary scaling

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def rope_specimen(
    folder: Path, scaling: dict[str, Any], **changes: Any
) -> tuple[Path, dict[str, Tensor]]:
    found = specimen("llama_bias")
    config = found.config | {
        "rope_scaling": scaling,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "head_dim": 16,
        **changes,
    }
    return write(folder, type(found)(config, found.tensors)), found.tensors


@pytest.mark.parametrize(
    "scaling",
    [
        LLAMA3,
        LLAMA3 | {"factor": 32.0},
        LLAMA3 | {"low_freq_factor": 2.0, "original_max_position_embeddings": 64},
    ],
)
def test_rope_factors_are_the_ratio_of_transformers_frequencies(
    tmp_path: Path, scaling: dict[str, Any]
) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    source, tensors = rope_specimen(tmp_path / "source", scaling)
    path = write_file(tmp_path / "m.gguf", source, tensors)
    factors = next(t for t in gguf.GGUFReader(path).tensors if t.name == "rope_freqs.weight")
    inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(source), "cpu")
    plain = 1.0 / 500000.0 ** (torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    ratio = (plain / inverse.double()).float()
    assert torch.allclose(
        torch.from_numpy(np.array(factors.data)), ratio, rtol=1e-5
    ) and not torch.all(ratio == 1)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_linear_and_yarn(tmp_path: Path, kind: str) -> None:
    scaling = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 32768}
    source, tensors = rope_specimen(tmp_path / "source", scaling)
    values = {
        k: f.contents()
        for k, f in gguf.GGUFReader(write_file(tmp_path / "m.gguf", source, tensors)).fields.items()
    }
    assert values["llama.rope.scaling.type"] == kind and values["llama.rope.scaling.factor"] == 4.0
    assert values["llama.rope.scaling.original_context_length"] == 32768


# --- files of others


def foreign(
    path: Path,
    name: str,
    *,
    dtype: torch.dtype = torch.float16,
    change: Callable[[Any], None] = lambda w: None,
    convert: Callable[[str, Tensor], Any] | None = None,
    **skip: Any,
) -> tuple[Path, dict[str, Tensor]]:
    """A file as llama.cpp's converter writes one, of the checkpoint `name` of the zoo, and the
    tensors under their own names.

    skip: keys to leave out or, with a value, to write instead. convert: gives raw data and its ggml
    type for some tensors.
    """
    found = specimen(name, dtype)
    config = found.config
    architecture = "llama" if name.startswith(("llama", "mistral")) else name
    writer = gguf.GGUFWriter(path, architecture)
    keys = {
        "block_count": 2,
        "context_length": config["max_position_embeddings"],
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.freq_base": config["rope_theta"],
        "vocab_size": 320,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }
    if "head_dim" in config:
        keys |= {
            "attention.key_length": config["head_dim"],
            "attention.value_length": config["head_dim"],
        }
    for key, value in (keys | {k.replace("__", "."): v for k, v in skip.items()}).items():
        if value is not None:
            add = {
                int: writer.add_uint32,
                float: writer.add_float32,
                str: writer.add_string,
                list: writer.add_array,
            }[type(value)]
            add(f"{architecture}.{key}", value)
    writer.add_uint32("tokenizer.ggml.bos_token_id", 0)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 1)
    for ours, value in found.tensors.items():
        module, _, part = ours.rpartition(".")
        if architecture == "llama" and module.endswith(("q_proj", "k_proj")):
            value = permuted_as_the_converter_does(value, 4 if module.endswith("q_proj") else 2)
        theirs = f"{to_gguf_name(module)}.{part}"
        special = convert(ours, value) if convert else None
        if special is not None:
            writer.add_tensor(theirs, special[0], raw_dtype=special[1])
        elif value.dim() == 1:
            writer.add_tensor(theirs, value.float().numpy())
        elif dtype == torch.bfloat16:
            writer.add_tensor(
                theirs, value.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16
            )
        else:
            writer.add_tensor(theirs, value.numpy())
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, found.tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["llama_bias", "mistral", "qwen2", "qwen3"])
def test_files_that_the_package_wrote(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    path, tensors = foreign(tmp_path / "model.gguf", name, dtype=dtype)
    weights = Weights(path)
    raw, config = weights.checkpoint.raw_config, weights.checkpoint.config
    original = specimen(name).config
    assert raw["model_type"] == ("llama" if name in ("llama_bias", "mistral") else name)
    assert (config.hidden, config.intermediate, config.layers, config.heads, config.kv_heads) == (
        64,
        96,
        2,
        4,
        2,
    )
    assert (config.vocabulary, config.max_positions, config.rope.theta) == (
        320,
        128,
        original["rope_theta"],
    )
    assert config.head_dim == original.get("head_dim", 16) and math.isclose(
        config.norm_eps, original["rms_norm_eps"], rel_tol=1e-6
    )
    assert (
        config.tied == (name == "qwen3")
        and config.dtype == str(dtype).removeprefix("torch.")
        and config.qk_norm == (name == "qwen3")
    )
    assert config.attention_bias == (name in ("llama_bias", "qwen2")) and config.output_bias == (
        name == "llama_bias"
    )
    assert (raw["bos_token_id"], raw["eos_token_id"]) == (0, 1) and weights.modules == set()
    assert set(weights.checkpoint.expected) == set(tensors)
    for key, value in tensors.items():
        assert torch.equal(weights.tensor(key), value.float() if value.dim() == 1 else value), key


def test_one_number_a_layer(tmp_path: Path) -> None:
    """Newer converters write lists of some sizes; where they differ from layer to layer, no
    config.json could say it."""
    same = {
        "attention.head_count": [4, 4],
        "attention.head_count_kv": [2, 2],
        "feed_forward_length": [96, 96],
    }
    path, _ = foreign(tmp_path / "a.gguf", "mistral", **same)
    assert Weights(path).checkpoint.config.kv_heads == 2
    path, _ = foreign(tmp_path / "b.gguf", "mistral", **{"attention.head_count_kv": [2, 1]})
    with pytest.raises(
        ModelError, match=r"llama\.attention\.head_count_kv: array.*expected a positive int"
    ):
        Gguf(path)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised(tmp_path: Path, factor: float) -> None:
    scaling = LLAMA3 | {"factor": factor}
    source, tensors = rope_specimen(tmp_path / "source", scaling)
    ours = write_file(tmp_path / "ours.gguf", source, tensors)
    factors = np.array(
        next(t.data for t in gguf.GGUFReader(ours).tensors if t.name == "rope_freqs.weight")
    )
    keys = {"rope.freq_base": 500000.0, "attention.key_length": 16}
    path, _ = foreign(
        tmp_path / "a.gguf",
        "llama_bias",
        change=lambda w: w.add_tensor("rope_freqs.weight", factors),
        **keys,
    )
    assert Gguf(path).config["rope_scaling"] == scaling
    path, _ = foreign(
        tmp_path / "b.gguf",
        "llama_bias",
        change=lambda w: w.add_tensor("rope_freqs.weight", factors * 1.01),
        **keys,
    )
    with pytest.raises(ModelError, match="other factors than Llama 3's"):
        Gguf(path)
    path, _ = foreign(
        tmp_path / "c.gguf",
        "llama_bias",
        change=lambda w: w.add_tensor("rope_freqs.weight", factors[:3]),
        **keys,
    )
    with pytest.raises(ModelError, match="other factors than Llama 3's"):
        Gguf(path)


def test_rotary_scaling_of_others(tmp_path: Path) -> None:
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    path, _ = foreign(tmp_path / "a.gguf", "mistral", **linear)
    assert (
        Checkpoint(path).config.rope.kind == "linear"
        and Checkpoint(path).config.rope.parameters["factor"] == 4
    )
    yarn = linear | {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 32}
    path, _ = foreign(tmp_path / "b.gguf", "qwen2", **yarn)
    assert Checkpoint(path).config.rope.parameters == {
        "factor": 4.0,
        "original_max_position_embeddings": 32.0,
    }
    path, _ = foreign(tmp_path / "c.gguf", "qwen2", **(linear | {"rope.scaling.type": "longrope"}))
    with pytest.raises(ModelError, match=r"rope\.scaling\.type: 'longrope'"):
        Gguf(path)
    path, _ = foreign(tmp_path / "d.gguf", "qwen2", **{"rope.dimension_count": 8})
    with pytest.raises(ModelError, match=r"rope\.dimension_count: 8; expected the whole head, 16"):
        Gguf(path)


@pytest.mark.parametrize("number", sorted(SUPERBLOCK_TYPES))
def test_superblocks(number: int) -> None:
    kind, size = gguf.GGMLQuantizationType(number), SUPERBLOCK_TYPES[number][1]
    generator = np.random.default_rng(number)
    raw = generator.integers(0, 256, (300, size), dtype=np.uint8)
    for at in (0, 2) if number != 14 else (208,):  # fp16 numbers, finite ones
        raw[:, at : at + 2] = (
            generator.standard_normal(300).astype(np.float16).view(np.uint8).reshape(300, 2)
        )
    found = dequantize_superblocks(number, torch.from_numpy(raw).view(-1))
    assert np.array_equal(found.numpy(), gguf.quants.dequantize(raw, kind).reshape(-1))


def test_a_mixture_of_types_as_llama_quantize_leaves_it(tmp_path: Path) -> None:
    """Q4_0 with a head in Q6_K and an embedding in Q8_0. The zoo is too small for superblocks: its
    rows are made longer here."""
    generator = np.random.default_rng(0)
    kept: dict[str, np.ndarray] = {}
    types = gguf.GGMLQuantizationType

    def convert(name: str, value: Tensor) -> Any:
        if value.dim() == 1:
            return None
        kind = {"lm_head.weight": types.Q6_K, "model.embed_tokens.weight": types.Q8_0}.get(
            name, types.Q4_0
        )
        raw = (
            gguf.quants.quantize(value.numpy().astype(np.float32), kind)
            if kind != types.Q6_K
            else None
        )
        if raw is None:
            raw = generator.integers(
                0, 256, (len(value), value.shape[1] // 256 * 210), dtype=np.uint8
            )
            raw.reshape(-1, 210)[:, 208:] = np.frombuffer(struct.pack("<e", 0.01), np.uint8)
        kept[name] = gguf.quants.dequantize(raw, kind)
        return raw, kind

    found = specimen("mistral", torch.float32)
    wide = {
        n: t.repeat(*([1] * (t.dim() - 1)), 4) if t.shape[-1] == 64 else t
        for n, t in found.tensors.items()
    }
    wide = {
        n: t.repeat(4, 1) if n.endswith(("o_proj.weight", "down_proj.weight")) else t
        for n, t in wide.items()
    }
    wide |= {n: t[:, :64].contiguous() for n, t in wide.items() if n.endswith("o_proj.weight")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            foreign.__globals__, "specimen", lambda name, dtype: type(found)(found.config, wide)
        )
        path, _ = foreign(
            tmp_path / "m.gguf",
            "mistral",
            dtype=torch.float32,
            convert=convert,
            embedding_length=256,
            **{"attention.key_length": 16, "attention.value_length": 16},
        )
    weights = Weights(path)
    assert weights.format is not None and weights.format.name == "gguf"
    assert weights.modules == {
        name.removesuffix(".weight") for name in kept if name != "lm_head.weight"
    }
    for name, value in kept.items():
        back = torch.from_numpy(value)
        if "q_proj" in name or "k_proj" in name:
            heads = 4 if "q_proj" in name else 2
            order = permuted_as_the_converter_does(torch.arange(len(back)), heads)
            back = torch.empty_like(back).index_copy_(0, order, back)
        assert torch.equal(weights.tensor(name), back), name


def test_what_is_not_read_says_what_to_do(tmp_path: Path) -> None:
    def message(name: str, **options: Any) -> str:
        path, _ = foreign(tmp_path / "x.gguf", name, **options)
        with pytest.raises(ModelError) as refused:
            Gguf(path)
        return str(refused.value)

    def raw(kind: Any, size: int) -> Callable[[str, Tensor], Any]:
        return lambda name, value: (
            (np.zeros((96, 256 // 256 * size), np.uint8), kind) if "gate_proj" in name else None
        )

    said = message("qwen3", convert=raw(gguf.GGMLQuantizationType.Q3_K, 110))
    assert (
        "2 tensors of type Q3_K, the first of which is 'blk.0.ffn_gate.weight'" in said
        and "llama-quantize --allow-requantize" in said
    )
    said = message(
        "qwen3",
        change=lambda w: w.add_tensor("blk.0.ffn_gate_exps.weight", np.zeros((2, 4), np.float32)),
    )
    assert "does not have: 'blk.0.ffn_gate_exps.weight'" in said
    assert "a mixture of experts" in message("qwen3", expert_count=8)
    assert "llama-gguf-split --merge" in message(
        "qwen3", change=lambda w: w.add_uint16("split.count", 3)
    )
    said = message("qwen3", block_count=None, context_length=None, vocab_size=None)
    assert all(
        f"qwen3.{key}: missing" in said for key in ("block_count", "context_length", "vocab_size")
    )
    path = tmp_path / "gemma.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ModelError, match=r"general\.architecture: 'gemma3'; expected one of llama, qwen2, qwen3"
    ):
        Gguf(path)
    for other in ("b.gguf", "a.gguf"):
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / other).write_bytes(path.read_bytes())
    with pytest.raises(ModelError, match=r"2 \.gguf files.*a\.gguf"):
        Weights(tmp_path / "two")


# --- hostile files


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def kv(key: str, kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def header(
    tensors: int,
    pairs: int,
    body: bytes = b"",
    magic: bytes = b"GGUF",
    version: bytes = struct.pack("<I", 3),
) -> bytes:
    return magic + version + struct.pack("<QQ", tensors, pairs) + body


def tensor(
    name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0, dims: int | None = None
) -> bytes:
    return text(name) + struct.pack(
        f"<I{len(shape)}QIQ", len(shape) if dims is None else dims, *shape, kind, offset
    )


LLAMA = kv("general.architecture", 8, text("llama"))
ARRAY = struct.Struct("<IQ")
U64 = 2**64 - 1


def with_tensors(*infos: bytes, pairs: bytes = b"", count: int = 1) -> bytes:
    return header(len(infos), count, LLAMA + pairs + b"".join(infos)) + bytes(4096)


def with_pair(pair: bytes, *infos: bytes) -> bytes:
    return with_tensors(*infos, pairs=pair, count=2)


def with_config(content: str, *infos: bytes) -> bytes:
    return with_pair(kv("quantflow.config", 8, text(content)), *infos)


# what is said of it, the file
HOSTILE = {
    "empty": ("an empty file", b""),
    "magic": ("first bytes", header(0, 0, magic=b"GGML")),
    "lfs": ("git lfs pull", b"version https://git-lfs.github.com/spec/v1\n"),
    "version 1": ("version 1", header(0, 0, version=struct.pack("<I", 1))),
    "version 4": ("version 4", header(0, 0, version=struct.pack("<I", 4))),
    "big-endian": ("big-endian", header(0, 0, version=struct.pack(">I", 3))),
    "no metadata": ("architecture: missing", header(0, 0)),
    "2^60 tensors": ("promises", header(2**60, 0)),
    "2^64 tensors": ("promises", header(U64, 0)),
    "many tensors": ("promises 131072", header(2**17, 0, bytes(2**22))),
    "many pairs": ("promises 131072", header(0, 2**17, bytes(2**22))),
    "2^60 pairs": ("promises", header(0, 2**60)),
    "2^60 letters": ("inside its header", header(0, 1, struct.pack("<Q", 2**60) + bytes(100))),
    "2^64 letters": ("inside its header", header(0, 1, struct.pack("<Q", U64) + bytes(100))),
    "2^60 letters in a value": (
        "inside its header",
        header(0, 1, kv("a", 8, struct.pack("<Q", 2**60))),
    ),
    "2^60 numbers": ("promises", header(0, 1, kv("a", 9, ARRAY.pack(4, 2**60)))),
    "2^61 long numbers": ("promises", header(0, 1, kv("a", 9, ARRAY.pack(10, 2**61)))),
    "2^60 strings": ("promises", header(0, 1, kv("a", 9, ARRAY.pack(8, 2**60)))),
    "strings that are not there": (
        "inside its header",
        header(0, 1, kv("a", 9, ARRAY.pack(8, 100) + struct.pack("<Q", 2**50) + bytes(1000))),
    ),
    "an array of arrays": (
        "type 9 of 9",
        header(0, 1, kv("a", 9, ARRAY.pack(9, 1) + ARRAY.pack(4, 1) + bytes(4))),
    ),
    "deep arrays": ("type 9 of 9", header(0, 1, kv("a", 9, ARRAY.pack(9, 1) * 50_000))),
    "a type of values": ("value of type 13", header(0, 1, kv("a", 13, bytes(16)))),
    "a type of items": ("type 9 of 77", header(0, 1, kv("a", 9, ARRAY.pack(77, 1) + bytes(16)))),
    "a key twice": ("stands there twice", header(0, 2, LLAMA + LLAMA)),
    "a key of no UTF-8": ("no UTF-8", header(0, 1, text(b"\xff\xfe") + struct.pack("<IB", 0, 1))),
    "a text of no UTF-8": (
        "no UTF-8",
        header(0, 1, kv("general.architecture", 8, text(b"llama\xff"))),
    ),
    "an architecture that is a number": (
        "architecture: 0",
        header(0, 1, kv("general.architecture", 4, bytes(4))),
    ),
    "alignment 0": ("alignment 0", with_pair(kv("general.alignment", 4, struct.pack("<I", 0)))),
    "alignment 3": ("alignment 3", with_pair(kv("general.alignment", 4, struct.pack("<I", 3)))),
    "alignment 2^40": (
        "alignment 1099511627776",
        with_pair(kv("general.alignment", 10, struct.pack("<Q", 2**40))),
    ),
    "alignment true": ("alignment True", with_pair(kv("general.alignment", 7, b"\1"))),
    "alignment of text": ("alignment '32'", with_pair(kv("general.alignment", 8, text("32")))),
    "5 dimensions": ("5 dimensions", with_tensors(tensor("output_norm.weight", (1, 1, 1, 1, 1)))),
    "2^31 dimensions": (
        "2147483648 dimensions",
        with_tensors(tensor("output_norm.weight", (1,), dims=2**31)),
    ),
    "no dimensions": ("0 dimensions", with_tensors(tensor("output_norm.weight", ()))),
    "empty tensor": ("0 bytes from", with_tensors(tensor("output_norm.weight", (2**63, 0)))),
    "huge tensor": (
        "within the file",
        with_tensors(tensor("output_norm.weight", (U64, U64, U64, U64))),
    ),
    "wrapping size": (
        "within the file",
        with_tensors(tensor("output_norm.weight", (2**32, 2**32))),
    ),
    "beyond the end": (
        "within the file",
        with_tensors(tensor("output_norm.weight", (64,), offset=2**40)),
    ),
    "wrapping offset": (
        "within the file",
        with_tensors(tensor("output_norm.weight", (64,), offset=U64 - 31)),
    ),
    "overlap": (
        "overlaps with",
        with_tensors(
            tensor("output_norm.weight", (64,)), tensor("token_embd.weight", (8, 8), offset=128)
        ),
    ),
    "a name twice": (
        "stands there twice",
        with_tensors(
            tensor("output_norm.weight", (4,)), tensor("output_norm.weight", (4,), offset=32)
        ),
    ),
    "a layer twice": (
        "does not have: 'blk.00.attn_norm.weight'",
        with_tensors(
            tensor("blk.0.attn_norm.weight", (4,)),
            tensor("blk.00.attn_norm.weight", (4,), offset=32),
        ),
    ),
    "a long name": ("too long a name", with_tensors(tensor("a" * 100, (4,)))),
    "blocks in one dimension": (
        "in blocks",
        with_tensors(tensor("output_norm.weight", (64,), kind=2)),
    ),
    "blocks in a bias": (
        "does not have: 'blk.0.attn_q.bias'",
        with_tensors(tensor("blk.0.attn_q.bias", (64, 2), kind=2)),
    ),
    "half a block": ("in blocks", with_tensors(tensor("output.weight", (33, 2), kind=8))),
    "half a superblock": ("in blocks", with_tensors(tensor("output.weight", (128, 2), kind=14))),
    "unknown type": ("of type 1000", with_tensors(tensor("output.weight", (64, 2), kind=1000))),
    "removed type": ("of type 4,", with_tensors(tensor("output.weight", (64, 2), kind=4))),
    "many problems": (
        "more such problems",
        header(3000, 1, LLAMA + b"".join(tensor(f"t{i}", (2**40,), offset=i) for i in range(3000))),
    ),
    "many strangers": (
        "and 2996 more",
        header(3000, 1, LLAMA + b"".join(tensor(f"t{i}", (1,), offset=32 * i) for i in range(3000)))
        + bytes(2**17),
    ),
    "tokens that are a number": (
        "vocab_size: missing",
        with_pair(kv("tokenizer.ggml.tokens", 4, bytes(4))),
    ),
    "experts that are text": ("mixture", with_pair(kv("llama.expert_count", 8, text("a")))),
    "config of text": ("not JSON", with_config("{")),
    "config of nothing": ("config of a decoder", with_config("null")),
    "config that is deep": ("not JSON", with_config("[" * 100_000)),
    "config of a number": ("not JSON", with_pair(kv("quantflow.config", 4, bytes(4)))),
    "config of another architecture": (
        "config of a decoder of llama",
        with_config('{"model_type":"qwen2","num_attention_heads":4}'),
    ),
    "config of no heads": (
        "config of a decoder",
        with_config('{"model_type":"llama","num_attention_heads":0}'),
    ),
    "config of odd heads": (
        "config of a decoder",
        with_config('{"model_type":"llama","num_attention_heads":4,"num_key_value_heads":"2"}'),
    ),
    "rows that are no heads": (
        "pairs of rows in 4 heads",
        with_config(
            '{"model_type":"llama","num_attention_heads":4}',
            tensor("blk.0.attn_q.weight", (32, 6), kind=2),
        ),
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(tmp_path: Path, case: str) -> None:
    path = tmp_path / "x.gguf"
    reason, data = HOSTILE[case]
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError) as refused:
            Weights(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert reason in str(refused.value) and peak < 10 * 2**20 and len(str(refused.value)) < 20_000


def small(path: Path, **metadata: Any) -> Path:
    found = specimen("llama_bias")
    source = write(path.parent / "source", found)
    tensors, schemes = with_blocks(found.tensors)
    said = {name: [s.bits, s.group_size, s.symmetric, s.kind] for name, s in schemes.items()}
    extra = {
        "quantflow.schemes": json.dumps(said),
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.scores": [0.5, 1.5],
        **metadata,
    }
    return write_file(path, source, tensors, **extra)


def read_all(path: Path) -> None:
    weights = Weights(path)
    weights.outer()
    for index in range(weights.checkpoint.config.layers):
        weights.layer(index)


def data_start(path: Path) -> int:
    return min(info.start for info in Gguf(path).tensors.values())


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = small(tmp_path / "m.gguf")
    read_all(path)
    data, cut = path.read_bytes(), tmp_path / "cut.gguf"
    last = max(info.stop for info in Gguf(path).tensors.values())
    places = [
        *range(0, data_start(path), 7),
        *(info.stop - 1 for info in Gguf(path).tensors.values()),
        last - 1,
    ]
    for place in places:
        cut.write_bytes(data[:place])
        with pytest.raises(ModelError):
            Gguf(cut)


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    path = small(tmp_path / "m.gguf")
    data = path.read_bytes()
    for name in (
        "model.norm.weight",
        "model.layers.1.self_attn.q_proj.q4_0",
        "model.layers.1.self_attn.v_proj.q4_1",
    ):
        info = Gguf(path).tensors[name]
        number = struct.pack("<f", math.inf) if info.dtype == "F32" else struct.pack("<e", math.nan)
        at = info.start + (2 if name.endswith("q4_1") else 0)
        (tmp_path / "x.gguf").write_bytes(data[:at] + number + data[at + len(number) :])
        with pytest.raises((ModelError, FormatError), match=r"infinite|minimums"):
            read_all(tmp_path / "x.gguf")


@pytest.mark.parametrize("own", [True, False], ids=["ours", "foreign"])
def test_flipped_bytes_of_the_header(tmp_path: Path, own: bool) -> None:
    """Whatever a header says, there is an answer or a message, and never another exception."""
    if own:
        path = small(tmp_path / "m.gguf")
    else:
        path, _ = foreign(
            tmp_path / "m.gguf",
            "qwen2",
            **{
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 2.0,
                "rope.scaling.original_context_length": 64,
            },
        )
    data, end = path.read_bytes(), data_start(path)
    generator, outcomes = random.Random(7), {"read": 0, "refused": 0}
    target = tmp_path / "fuzz.gguf"
    for _ in range(1000):
        changed = bytearray(data)
        for _ in range(generator.choice((1, 1, 2, 8))):
            changed[generator.randrange(end)] = generator.choice(
                (0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256))
            )
        target.write_bytes(changed)
        try:
            read_all(target)
            outcomes["read"] += 1
        except (ModelError, FormatError):
            outcomes["refused"] += 1
    assert outcomes["read"] > 20 and outcomes["refused"] > 200
