"""GGUF, llama.cpp's file of metadata and tensors, version 3: reading and writing, one tensor at a time.

The layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tensors go by their Hugging Face names here. llama.cpp's own
names, the order of rotary channels in q and k of its `llama` architecture, and the blocks of each type are this file's business; what
the codes in a block mean is `formats/gguf.py`'s.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from quantflow.errors import FormatError, ModelError, Problem
from quantflow.models.config import DecoderConfig
from quantflow.models.tensor_file import ITEM_BYTES, TensorInfo, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32  # weights
MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
SCHEMES_KEY, CONFIG_KEY = "quantflow.schemes", "quantflow.config"  # what llama.cpp has no place for
NAME = "model.gguf"

_PLAIN = {0: "F32", 1: "F16", 30: "BF16"}
# ggml's number of a type -> its name, and the bytes of a block of 32 weights
BLOCK_TYPES = {2: ("q4_0", 18), 3: ("q4_1", 20), 8: ("q8_0", 34)}
_OTHER_TYPES = {
    6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 16: "IQ2_XXS", 18: "IQ3_XXS", 20: "IQ4_NL",
    21: "IQ3_S", 23: "IQ4_XS", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
_FILE_TYPES = {"F32": 0, "F16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "BF16": 32}  # general.file_type: of most weights

_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INNER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
# model_type of config.json -> the architecture's name, and whether q and k lie in the order of llama.cpp's rotary pairs
ARCHITECTURES = {"llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` is, or that lies in that directory alone; else None."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    found = sorted(path.glob("*.gguf"))
    return found[0] if len(found) == 1 else None


def to_gguf_name(module: str) -> str:
    """llama.cpp's name of a module: `blk.0.attn_q` for `model.layers.0.self_attn.q_proj`. KeyError for one that it has not."""
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
        return f"blk.{match[1]}.{_INNER[match[2]]}"
    return _OUTER[module]


def from_gguf_name(name: str) -> str | None:
    """The inverse of `to_gguf_name`; None for a name that is not known."""
    if match := re.fullmatch(r"blk\.(\d{1,6})\.(.+)", name):
        inner = next((ours for ours, theirs in _INNER.items() if theirs == match[2]), None)
        return inner and f"model.layers.{match[1]}.{inner}"
    return next((ours for ours, theirs in _OUTER.items() if theirs == name), None)


def to_rotary_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows `[heads * D, …]` of q or k (or their bias) from halves (channel `i` turns with `i + D/2`) to pairs that lie together."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def to_rotary_halves(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `to_rotary_pairs`."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _rotary_heads(module: str, config: Mapping[str, Any]) -> int:
    """The heads by which a module's rows are reordered; 0 where they are not."""
    if not ARCHITECTURES.get(str(config.get("model_type")), ("", False))[1]:
        return 0
    heads = config["num_attention_heads"]
    leaf = module.rpartition(".")[2]
    return int({"q_proj": heads, "k_proj": config.get("num_key_value_heads") or heads}.get(leaf, 0))


# --- reading


@dataclass(frozen=True)
class _Place:
    module: str
    info: TensorInfo  # start and stop are places in the file


class Gguf:
    """A GGUF file as a checkpoint: plain tensors by their Hugging Face names, blocks as uint8 `[N, bytes]` under `{module}.q4_0` and the
    like. Raises ModelError for a damaged file, with all that is wrong, and for types and architectures that are not read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [path]
        self.tokenizer = path.parent
        self.metadata, found = _read_header(path)
        self._places: dict[str, _Place] = {}
        problems = []
        for name, (kind, info) in found.items():
            module = from_gguf_name(name.rpartition(".")[0])
            part = name.rpartition(".")[2]
            if name == "rope_freqs.weight":
                continue  # computed from the config
            if module is None or part not in ("weight", "bias"):
                problems.append(Problem(f"{path} tensor {name}", "none that QuantFlow knows", "a decoder of llama, qwen2 or qwen3"))
            elif kind in _PLAIN:
                self._places[f"{module}.{part}"] = _Place(module, info)
            else:
                self._places[f"{module}.{BLOCK_TYPES[kind][0]}"] = _Place(module, info)
        if problems:
            raise ModelError(problems)
        self.tensors: Mapping[str, TensorInfo] = {name: place.info for name, place in self._places.items()}
        self.config = self._config(rope_factors="rope_freqs.weight" in found)

    def read(self, name: str, index: int | None = None) -> Tensor:
        import torch

        place = self._places[name]
        info = place.info
        tensor = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
        view = tensor.reshape(-1).view(torch.uint8).numpy().data
        with open(self.path, "rb", buffering=0) as file:
            file.seek(info.start)
            done = 0
            while done < info.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise ModelError(Problem(f"{self.path} tensor {name}", "the file ends inside the tensor", hint="Download it again"))
                done += count
        if heads := _rotary_heads(place.module, self.config):
            tensor = to_rotary_halves(tensor, heads)
        return tensor if index is None else tensor[index].clone()

    def kv_parameters(self) -> dict[str, Tensor]:
        return {}

    def _config(self, rope_factors: bool) -> dict[str, Any]:
        """What config.json would say."""
        own = self.metadata.get(CONFIG_KEY)
        config = self._own_config(own) if own is not None else self._standard_config(rope_factors)
        said = self.metadata.get(SCHEMES_KEY, "{}")
        try:
            schemes = json.loads(said) if isinstance(said, str) else None
        except (ValueError, RecursionError):
            schemes = None
        if not isinstance(schemes, dict):
            raise ModelError(Problem(f"{self.path} {SCHEMES_KEY}", f"{said!r}"[:80], "a JSON object"))
        types = {place.module: kind for name, place in self._places.items() if (kind := name.rpartition(".")[2]) not in ("weight", "bias")}
        if types:
            known = {module: scheme for module, scheme in schemes.items() if module in types}
            config["quantization_config"] = {"quant_method": "gguf", "types": types, "schemes": known}
        return config

    def _own_config(self, text: Any) -> dict[str, Any]:
        try:
            config = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise ModelError(Problem(f"{self.path} {CONFIG_KEY}", f"not JSON ({error})", "a JSON object")) from error
        heads = config.get("num_attention_heads") if isinstance(config, dict) else None
        if type(heads) is not int or heads < 1:
            raise ModelError(Problem(f"{self.path} {CONFIG_KEY}", f"{text!r}"[:80], "the config of a decoder"))
        config.pop("quantization_config", None)
        return dict(config)

    def _standard_config(self, rope_factors: bool) -> dict[str, Any]:
        architecture = self.metadata.get("general.architecture")
        if architecture not in _CLASSES:
            raise ModelError(Problem(f"{self.path} general.architecture", repr(architecture), f"one of {', '.join(_CLASSES)}"))
        problems: list[Problem] = []

        def value(key: str, kind: type, default: Any = None) -> Any:
            found = self.metadata.get(f"{architecture}.{key}", default)
            if kind is float and isinstance(found, int) and not isinstance(found, bool):
                found = float(found)
            wrong = not isinstance(found, kind) or isinstance(found, bool)
            if wrong or (isinstance(found, int) and not 0 < found < 2**31):
                expected = f"a positive {kind.__name__}"
                problems.append(Problem(f"{self.path} {architecture}.{key}", "missing" if found is None else f"{found!r}"[:80], expected))
                return 1
            return found

        heads, hidden = value("attention.head_count", int), value("embedding_length", int)
        embedding = self.tensors.get("model.embed_tokens.weight") or self.tensors.get("lm_head.weight")
        config: dict[str, Any] = {
            "architectures": [_CLASSES[str(architecture)]],
            "model_type": architecture,
            "hidden_size": hidden,
            "intermediate_size": value("feed_forward_length", int),
            "num_hidden_layers": value("block_count", int),
            "num_attention_heads": heads,
            "num_key_value_heads": value("attention.head_count_kv", int, heads),
            "head_dim": value("attention.key_length", int, max(1, hidden // heads)),
            "max_position_embeddings": value("context_length", int),
            "rms_norm_eps": value("attention.layer_norm_rms_epsilon", float),
            "rope_theta": value("rope.freq_base", float, 10000.0),
            "vocab_size": value("vocab_size", int, len(self.metadata.get("tokenizer.ggml.tokens") or []) or None),
            "hidden_act": "silu",
            "tie_word_embeddings": not any(place.module == "lm_head" for place in self._places.values()),
            "torch_dtype": {"F32": "float32", "BF16": "bfloat16"}.get(embedding.dtype if embedding else "", "float16"),
        }
        if architecture == "llama":
            config["attention_bias"] = "model.layers.0.self_attn.o_proj.bias" in self._places
        kind = self.metadata.get(f"{architecture}.rope.scaling.type", "none")
        if kind in ("linear", "yarn"):
            scaling: dict[str, Any] = {"rope_type": kind, "factor": value("rope.scaling.factor", float)}
            if kind == "yarn":
                scaling["original_max_position_embeddings"] = value("rope.scaling.original_context_length", int)
            config["rope_scaling"] = scaling
        elif kind != "none" or rope_factors:
            found = f"rope scaling {kind!r}" if kind != "none" else "rope_freqs.weight"
            problems.append(Problem(str(self.path), found, "none, linear or yarn", "Convert the original checkpoint instead"))
        for role in ("bos", "eos"):
            token = self.metadata.get(f"tokenizer.ggml.{role}_token_id")
            if isinstance(token, int):
                config[f"{role}_token_id"] = token
        if problems:
            raise ModelError(problems)
        return config


class _Reader:
    """The bytes of a header, none of which are believed before they are there."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.left = path, file, size

    def wrong(self, found: str, expected: str = "") -> ModelError:
        return ModelError(Problem(str(self.path), found, expected, "The file is damaged or incomplete: copy or download it again"))

    def take(self, count: int) -> bytes:
        if not 0 <= count <= self.left:
            raise self.wrong(f"the file ends {count - self.left} bytes inside its header", "a GGUF file")
        self.left -= count
        return self.file.read(count)

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def text(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return raw.decode("utf-8", "surrogateescape")  # tokens of some vocabularies are no whole letters

    def count(self, least: int) -> int:
        """A number of things of at least `least` bytes each."""
        found = int(self.number("Q"))
        if found * least > self.left:
            raise self.wrong(f"a header that promises {found} entries in {self.left} bytes", "a GGUF file")
        return found

    def value(self, kind: int, depth: int = 0) -> Any:
        forms = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
        if kind in forms:
            return self.number(forms[kind])
        if kind == 8:
            return self.text()
        if kind != 9 or depth > 2:
            raise self.wrong(f"a metadata value of type {kind}", "types 0 to 12")
        item = int(self.number("I"))
        if item in forms:
            size = struct.calcsize("<" + forms[item])
            count = self.count(size)
            return list(struct.unpack(f"<{count}{forms[item]}", self.take(count * size)))
        return [self.value(item, depth + 1) for _ in range(self.count(8))]


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, TensorInfo]]]:
    """Metadata, and of every tensor its ggml type, and the dtype, shape and place as `TensorFile` has them."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            reader = _Reader(path, file, size)
            magic = reader.take(min(4, size))
            if magic != MAGIC:
                raise reader.wrong(f"the first bytes are {magic!r}", f"{MAGIC!r}")
            version = reader.number("I")
            if version not in (2, 3):
                raise reader.wrong(f"version {version}", "2 or 3, little-endian")
            tensor_count, metadata_count = reader.count(24), reader.count(12)
            metadata = {}
            for _ in range(metadata_count):
                key = reader.text()
                metadata[key] = reader.value(reader.number("I"))
            headers = {}
            for _ in range(tensor_count):
                name, dims = reader.text(), reader.number("I")
                if dims > 4:
                    raise reader.wrong(f"tensor {name} has {dims} dimensions", "at most 4")
                shape = tuple(reader.number("Q") for _ in range(dims))
                headers[name] = (shape[::-1], reader.number("I"), reader.number("Q"))
            at = size - reader.left
    except OSError as error:
        raise ModelError(Problem(str(path), error.strerror or str(error), "a readable GGUF file")) from error
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
        raise reader.wrong(f"general.alignment {alignment!r}", "a power of two")
    base = at + -at % alignment
    return metadata, _placed(path, headers, base, size)


def _placed(path: Path, headers: Mapping[str, tuple[tuple[int, ...], int, int]], base: int, size: int) -> dict[str, tuple[int, TensorInfo]]:
    found, problems = {}, []
    for name, (shape, kind, offset) in headers.items():
        where = f"{path} tensor {name}"
        if kind in _PLAIN:
            dtype, nbytes = _PLAIN[kind], math.prod(shape) * ITEM_BYTES[_PLAIN[kind]]
        elif kind in BLOCK_TYPES and len(shape) == 2 and shape[1] % BLOCK == 0:
            dtype, shape = "U8", (shape[0], shape[1] // BLOCK * BLOCK_TYPES[kind][1])
            nbytes = math.prod(shape)
        else:
            known = ", ".join([*_PLAIN.values(), *(name.upper() for name, _ in BLOCK_TYPES.values())])
            problems.append(Problem(where, f"type {_OTHER_TYPES.get(kind, kind)}, shape {list(shape)}", f"one of {known}"))
            continue
        start = base + offset
        if start + nbytes > size:
            problems.append(Problem(where, f"it ends at byte {start + nbytes}, the file at {size}", "a whole file", "Download it again"))
        found[name] = (kind, TensorInfo(dtype, shape, start, start + nbytes))
    at, last = base, ""
    for name, (_, info) in sorted(found.items(), key=lambda item: item[1][1].start):
        if info.start < at:
            problems.append(Problem(f"{path} tensor {name}", f"it overlaps with {last}", "tensors one after the other"))
        at, last = info.stop, name
    if problems:
        raise ModelError(problems)
    return found


# --- writing


class GgufWriter:
    """Writes a GGUF file whose tensors arrive one at a time under their Hugging Face names, in any order.

    specs: name -> (safetensors dtype, shape), as `TensorWriter` takes them; blocks are `{module}.q4_0` and the like, uint8 `[N, bytes]`.
    Vectors (norms, biases) are written in float32, which llama.cpp asks for. config: a native config.json. metadata: further keys. The
    caller writes to a temporary name and renames.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, tuple[str, tuple[int, ...]]], config: Mapping[str, Any], decoder: DecoderConfig,
        metadata: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.path, self._config = path, dict(config)
        self._specs = dict(specs)
        self._missing = set(specs)
        kinds = {name: _type_of(name, *spec) for name, spec in specs.items()}
        described = {**_decoder_metadata(self._config, decoder, kinds), **metadata, CONFIG_KEY: _json(self._config)}
        offset, infos = 0, bytearray()
        offsets = {}
        for name, (dtype, shape) in specs.items():
            module, _, part = name.rpartition(".")
            kind, logical, nbytes = _extent(kinds[name], dtype, shape)
            own = f"{to_gguf_name(module)}.{'bias' if part == 'bias' else 'weight'}"
            infos += _text(own) + struct.pack("<I", len(logical)) + struct.pack(f"<{len(logical)}Q", *logical[::-1])
            infos += struct.pack("<IQ", kind, offset)
            offsets[name] = offset
            offset += nbytes + -nbytes % ALIGNMENT
        factors = _rope_factors(decoder)
        if factors is not None:
            infos += _text("rope_freqs.weight") + struct.pack("<IQIQ", 1, factors.numel(), 0, offset)
            offsets["rope_freqs"] = offset
            offset += factors.numel() * 4 + -factors.numel() * 4 % ALIGNMENT
        head = MAGIC + struct.pack("<IQQ", VERSION, len(specs) + (factors is not None), len(described))
        for key, value in described.items():
            head += _text(key) + _value(value)
        head += infos
        head += bytes(-len(head) % ALIGNMENT)
        self._offsets = {name: len(head) + o for name, o in offsets.items()}
        self._file = open(path, "wb")  # noqa: SIM115 - closed by `close`
        self._file.write(head)
        self._file.truncate(len(head) + offset)
        if factors is not None:
            self._put("rope_freqs", factors)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes the tensor; it must have the dtype and shape that were announced."""
        dtype, shape = self._specs[name]
        if tensor.dtype != torch_dtype(dtype) or tuple(tensor.shape) != tuple(shape) or name not in self._missing:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} announced as {dtype} {tuple(shape)}, or written twice")
        self._missing.discard(name)
        if heads := _rotary_heads(name.rpartition(".")[0], self._config):
            tensor = to_rotary_pairs(tensor, heads)
        self._put(name, tensor.float() if len(shape) == 1 else tensor)

    def _put(self, name: str, tensor: Tensor) -> None:
        import torch

        self._file.seek(self._offsets[name])
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        if self._missing:
            raise ValueError(f"{self.path}: never written: {', '.join(sorted(self._missing)[:5])}")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> GgufWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def decoder_problems(model_type: str, config: DecoderConfig) -> list[Problem]:
    """What llama.cpp does not compute as this decoder does."""
    problems = []
    if model_type not in ARCHITECTURES:
        problems.append(Problem("gguf", f"model_type {model_type!r}", f"one of {', '.join(ARCHITECTURES)}"))
    if config.experts:
        problems.append(Problem("gguf", "a mixture of experts, which this writer does not stack", "a dense decoder"))
    if config.activation != "silu":
        problems.append(Problem("gguf", f"activation {config.activation}", "silu"))
    if config.mlp_bias:
        problems.append(Problem("gguf", "biases in the MLP", "none"))
    if any(window is not None and window < config.max_positions for window in config.sliding_windows):
        problems.append(Problem("gguf", "a sliding window, which llama.cpp leaves out for this family", "full attention"))
    if config.rope.kind not in ("default", "linear", "yarn", "llama3"):
        problems.append(Problem("gguf", f"rope scaling of type {config.rope.kind}", "default, linear, yarn or llama3"))
    if config.logn_length is not None:
        problems.append(Problem("gguf", "logn attention scaling", "none"))
    return problems


def _decoder_metadata(config: Mapping[str, Any], decoder: DecoderConfig, kinds: Mapping[str, str]) -> dict[str, Any]:
    name = ARCHITECTURES[str(config["model_type"])][0]
    blocks = [kind for kind in kinds.values() if kind in _FILE_TYPES and kind not in _PLAIN.values()]
    most = max(sorted(set(blocks)), key=blocks.count) if blocks else kinds["model.embed_tokens.weight"]
    found: dict[str, Any] = {
        "general.architecture": name,
        "general.file_type": _FILE_TYPES[most],
        "general.quantization_version": 2,
        f"{name}.block_count": decoder.layers,
        f"{name}.context_length": decoder.max_positions,
        f"{name}.embedding_length": decoder.hidden,
        f"{name}.feed_forward_length": decoder.intermediate,
        f"{name}.attention.head_count": decoder.heads,
        f"{name}.attention.head_count_kv": decoder.kv_heads,
        f"{name}.attention.key_length": decoder.head_dim,
        f"{name}.attention.value_length": decoder.head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": float(decoder.norm_eps),
        f"{name}.rope.freq_base": float(decoder.rope.theta),
        f"{name}.rope.dimension_count": decoder.head_dim,
        f"{name}.vocab_size": decoder.vocabulary,
    }
    rope = decoder.rope
    if rope.kind in ("linear", "yarn"):
        found[f"{name}.rope.scaling.type"] = rope.kind
        found[f"{name}.rope.scaling.factor"] = rope.parameters["factor"]
    if rope.kind == "yarn":
        trained = rope.parameters.get("original_max_position_embeddings", decoder.max_positions)
        found[f"{name}.rope.scaling.original_context_length"] = int(trained)
    return found


def _rope_factors(decoder: DecoderConfig) -> Tensor | None:
    """float32 `[D/2]`: by what llama.cpp divides each frequency, for Llama 3's scaling; None for other kinds."""
    if decoder.rope.kind != "llama3":
        return None
    import torch

    p = decoder.rope.parameters
    trained = p.get("original_max_position_embeddings", float(decoder.max_positions))
    frequencies = 1.0 / decoder.rope.theta ** (torch.arange(0, decoder.head_dim, 2, dtype=torch.float64) / decoder.head_dim)
    waves = 2 * math.pi / frequencies
    smooth = ((trained / waves - p["low_freq_factor"]) / (p["high_freq_factor"] - p["low_freq_factor"])).clamp(0, 1)
    return (1 / ((1 - smooth) / p["factor"] + smooth)).float()


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
    for number, name in _PLAIN.items():
        if name == kind:
            return number, shape, math.prod(shape) * ITEM_BYTES[kind]
    raise FormatError(Problem("gguf", f"a tensor of dtype {dtype}", f"one of {', '.join(_PLAIN.values())}"))


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A metadata value with its type: bool, uint32 (where it fits), float32, string, or a list of one of them."""
    kind, form = _kind(value)
    if isinstance(value, list):
        item, form = _kind(value[0]) if value else (8, "")
        if item == 4:
            item, form = 5, "i"  # as the vocabulary's types are
        body = b"".join(map(_text, value)) if item == 8 else struct.pack(f"<{len(value)}{form}", *value)
        return struct.pack("<IIQ", 9, item, len(value)) + body
    return struct.pack("<I", kind) + (_text(value) if kind == 8 else struct.pack("<" + form, value))


def _kind(value: Any) -> tuple[int, str]:
    if isinstance(value, bool):
        return 7, "?"
    if isinstance(value, int):
        return (4, "I") if 0 <= value < 2**32 else (11, "q")
    return (6, "f") if isinstance(value, float) else (8, "")
