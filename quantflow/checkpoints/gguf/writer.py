"""Writing GGUF: `file.py` backwards, and what llama.cpp must be told of a decoder."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantflow.checkpoints.gguf.config import CONFIG_KEY, VECTORS_KEY
from quantflow.checkpoints.gguf.gemma import gemma_metadata, gemma_problems
from quantflow.checkpoints.gguf.header import ALIGNMENT, MAGIC, VERSION
from quantflow.checkpoints.gguf.names import FAMILIES, Family, to_gguf_name
from quantflow.checkpoints.gguf.rotary import llama3_factors, rotary_heads, to_rotary_pairs
from quantflow.checkpoints.gguf.types import BLOCK, BLOCK_TYPES, PLAIN_TYPES
from quantflow.checkpoints.tensor_file import ITEM_BYTES, AnnouncedWriter
from quantflow.errors import FormatError, Problem
from quantflow.models.config import DecoderConfig

if TYPE_CHECKING:
    from torch import Tensor

_GEMMA = ("gemma2", "gemma3")
# general.file_type: of most weights
_FILE_TYPES = {"F32": 0, "F16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "BF16": 32}


class GgufWriter(AnnouncedWriter):
    """Writes a GGUF file whose tensors arrive one at a time under their Hugging Face names, in any
    order.

    specs: name -> (safetensors dtype, shape), as `TensorWriter` takes them; blocks are
    `{module}.q4_0` and the like, uint8 `[N, bytes]`. Vectors (norms, biases) are written in
    float32, which llama.cpp asks for. config: a native config.json. metadata: further keys. The
    caller writes to a temporary name and renames.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, tuple[str, tuple[int, ...]]],
        config: Mapping[str, Any],
        decoder: DecoderConfig,
        metadata: Mapping[str, Any],
    ) -> None:
        self._config = dict(config)
        self._family = FAMILIES[str(config["model_type"])]
        kinds = {name: _type_of(name, *spec) for name, spec in specs.items()}
        described = {
            **_decoder_metadata(self._config, decoder, kinds),
            **metadata,
            CONFIG_KEY: _json(self._config),
        }
        vectors = {dtype for dtype, shape in specs.values() if len(shape) == 1}
        if len(vectors) == 1:  # what a reader may turn them into again
            described[VECTORS_KEY] = vectors.pop()
        offset, infos = 0, bytearray()
        offsets = {}
        for name, (dtype, shape) in specs.items():
            module, _, part = name.rpartition(".")
            kind, logical, nbytes = _extent(kinds[name], dtype, shape)
            own = f"{to_gguf_name(module, self._family)}.{'bias' if part == 'bias' else 'weight'}"
            infos += (
                _text(own)
                + struct.pack("<I", len(logical))
                + struct.pack(f"<{len(logical)}Q", *logical[::-1])
            )
            infos += struct.pack("<IQ", kind, offset)
            offsets[name] = offset
            offset += nbytes + -nbytes % ALIGNMENT
        factors = _rope_factors(decoder)
        if factors is not None:
            infos += _text("rope_freqs.weight") + struct.pack(
                "<IQIQ", 1, factors.numel(), 0, offset
            )
            offsets["rope_freqs"] = offset
            offset += factors.numel() * 4 + -factors.numel() * 4 % ALIGNMENT
        head = MAGIC + struct.pack(
            "<IQQ", VERSION, len(specs) + (factors is not None), len(described)
        )
        for key, value in described.items():
            head += _text(key) + _value(value)
        head += infos
        head += bytes(-len(head) % ALIGNMENT)
        super().__init__(
            path,
            specs,
            head,
            {name: len(head) + o for name, o in offsets.items()},
            len(head) + offset,
        )
        if factors is not None:
            self._put("rope_freqs", factors)

    def _as_stored(self, name: str, tensor: Tensor) -> Tensor:
        if heads := rotary_heads(name.rpartition(".")[0], self._config):
            tensor = to_rotary_pairs(tensor, heads)
        if self._family.adds_one and name.endswith("norm.weight"):
            tensor = tensor.float() + 1
        return tensor.float() if tensor.dim() == 1 else tensor


def decoder_problems(model_type: str, config: DecoderConfig) -> list[Problem]:
    """What llama.cpp does not compute as this decoder does."""
    problems = []
    family = FAMILIES.get(model_type, Family(""))
    if model_type not in FAMILIES:
        problems.append(
            Problem("gguf", f"model_type {model_type!r}", f"one of {', '.join(FAMILIES)}")
        )
    if config.experts:
        problems.append(
            Problem(
                "gguf", "a mixture of experts, which this writer does not stack", "a dense decoder"
            )
        )
    if config.activation != family.activation:
        problems.append(Problem("gguf", f"activation {config.activation}", family.activation))
    if config.mlp_bias:
        problems.append(Problem("gguf", "biases in the MLP", "none"))
    if family.architecture in _GEMMA:
        problems += gemma_problems(family.architecture, config)
    elif any(window is not None and window < config.context for window in config.sliding_windows):
        problems.append(
            Problem(
                "gguf",
                "a sliding window, which llama.cpp leaves out for this family",
                "full attention",
            )
        )
    # Dynamic scaling, and the first Qwen's logn, change nothing up to the trained length, which is
    # all that the file promises.
    if config.rope.kind not in ("default", "dynamic", "qwen", "linear", "yarn", "llama3"):
        problems.append(
            Problem(
                "gguf",
                f"rope scaling of type {config.rope.kind}",
                "default, dynamic, linear, yarn or llama3",
            )
        )
    known = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": 1.0}
    rope = {
        k: v
        for k, v in config.rope.parameters.items()
        if k not in ("factor", "original_max_position_embeddings")
    }
    if config.rope.kind == "yarn" and any(known.get(key) != number for key, number in rope.items()):
        problems.append(
            Problem("gguf", f"yarn with {rope}", f"llama.cpp's own {known}, and no other")
        )
    if model_type == "qwen3" and config.attention_bias:
        problems.append(
            Problem("gguf", "biases in the attention of Qwen3", "none, as llama.cpp has it")
        )
    return problems


def _decoder_metadata(
    config: Mapping[str, Any], decoder: DecoderConfig, kinds: Mapping[str, str]
) -> dict[str, Any]:
    name = FAMILIES[str(config["model_type"])].architecture
    blocks = [
        kind for kind in kinds.values() if kind in _FILE_TYPES and kind not in PLAIN_TYPES.values()
    ]
    most = (
        max(sorted(set(blocks)), key=blocks.count) if blocks else kinds["model.embed_tokens.weight"]
    )
    metadata: dict[str, Any] = {
        "general.architecture": name,
        "general.file_type": _FILE_TYPES[most],
        "general.quantization_version": 2,
        f"{name}.block_count": decoder.layers,
        f"{name}.context_length": _context_length(decoder),
        f"{name}.embedding_length": decoder.hidden,
        f"{name}.feed_forward_length": decoder.intermediate,
        f"{name}.attention.head_count": decoder.heads,
        f"{name}.attention.head_count_kv": decoder.kv_heads,
        f"{name}.attention.key_length": decoder.head_dim,
        f"{name}.attention.value_length": decoder.head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": float(decoder.norm_eps),
        f"{name}.rope.freq_base": float(decoder.rope.theta),
        f"{name}.rope.dimension_count": decoder.rope.turning(decoder.head_dim),
        f"{name}.vocab_size": decoder.vocabulary,
    }
    if name in _GEMMA:
        metadata |= gemma_metadata(name, decoder)
    rope = decoder.rope
    if rope.kind in ("linear", "yarn"):
        metadata[f"{name}.rope.scaling.type"] = rope.kind
        metadata[f"{name}.rope.scaling.factor"] = rope.parameters["factor"]
    if rope.kind == "yarn" or (
        "original_max_position_embeddings" in rope.parameters and rope.kind == "linear"
    ):
        trained = rope.parameters.get("original_max_position_embeddings", decoder.max_positions)
        metadata[f"{name}.rope.scaling.original_context_length"] = int(trained)
    return metadata


def _context_length(decoder: DecoderConfig) -> int:
    """As llama.cpp's converter has it. Of a linear embedding that says no trained length this is
    the trained one, which readers stretch."""
    rope = decoder.rope
    trained = rope.kind == "linear" and "original_max_position_embeddings" not in rope.parameters
    return decoder.max_positions if trained else decoder.context


def _rope_factors(decoder: DecoderConfig) -> Tensor | None:
    """float32 `[D/2]`: by what llama.cpp divides each frequency, for Llama 3's scaling; None for
    other kinds."""
    if decoder.rope.kind != "llama3":
        return None
    parameters = {
        "original_max_position_embeddings": float(decoder.max_positions),
        **decoder.rope.parameters,
    }
    return llama3_factors(decoder.rope.theta, decoder.head_dim, parameters)


def _type_of(name: str, dtype: str, shape: tuple[int, ...]) -> str:
    """The name of the type that a tensor gets."""
    if dtype == "U8":
        return name.rpartition(".")[2]
    return "F32" if len(shape) == 1 else dtype


def _extent(kind: str, dtype: str, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...], int]:
    """ggml's number of a type, the shape in weights, and the bytes in the file."""
    for number, (name, size) in BLOCK_TYPES.items():
        if name == kind:
            return number, (shape[0], shape[1] // size * BLOCK), math.prod(shape)
    for number, name in PLAIN_TYPES.items():
        if name == kind:
            return number, shape, math.prod(shape) * ITEM_BYTES[kind]
    raise FormatError(
        Problem("gguf", f"a tensor of dtype {dtype}", f"one of {', '.join(PLAIN_TYPES.values())}")
    )


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A metadata value with its type: bool, uint32 (where it fits), float32, string, or a list of
    one of them."""
    kind, form = _kind(value)
    if isinstance(value, list):
        item, form = _kind(value[0]) if value else (8, "")
        if item == 4:
            item, form = 5, "i"  # as the vocabulary's types are
        body = (
            b"".join(map(_text, value))
            if item == 8
            else struct.pack(f"<{len(value)}{form}", *value)
        )
        return struct.pack("<IIQ", 9, item, len(value)) + body
    return struct.pack("<I", kind) + (_text(value) if kind == 8 else struct.pack("<" + form, value))


def _kind(value: Any) -> tuple[int, str]:
    if isinstance(value, bool):
        return 7, "?"
    if isinstance(value, int):
        return (4, "I") if 0 <= value < 2**32 else (11, "q")
    return (6, "f") if isinstance(value, float) else (8, "")
