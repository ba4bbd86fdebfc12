"""GGUF, llama.cpp's file of metadata and tensors, version 3: reading, one tensor at a time.
`gguf_writer.py` writes it.

The layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tensors go by their Hugging
Face names here. llama.cpp's own names, the order of rotary channels in q and k of its `llama`
architecture, and the blocks of each type are this file's business; what the codes in a block mean
is `formats/gguf.py`'s.
"""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from quantflow.checkpoints.directory import half_letters
from quantflow.checkpoints.gguf.superblocks import (
    SUPERBLOCK,
    SUPERBLOCK_TYPES,
    dequantize_superblocks,
)
from quantflow.checkpoints.rounding import converted
from quantflow.checkpoints.tensor_file import (
    ITEM_BYTES,
    MAX_HEADER_BYTES,
    TensorInfo,
    read_full,
    torch_dtype,
)
from quantflow.errors import ModelError, Problem
from quantflow.placeholder import placeholder_at

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32  # weights
MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
# what llama.cpp has no place for
SCHEMES_KEY, CONFIG_KEY, VECTORS_KEY = "quantflow.schemes", "quantflow.config", "quantflow.vectors"
NAME = "model.gguf"

PLAIN_TYPES = {0: "F32", 1: "F16", 30: "BF16"}
# ggml's number of a type -> its name, and the bytes of a block of 32 weights
BLOCK_TYPES = {2: ("q4_0", 18), 3: ("q4_1", 20), 8: ("q8_0", 34)}
_OTHER_TYPES = {
    6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
_READ_TYPES = ", ".join(
    [
        *PLAIN_TYPES.values(),
        *(name.upper() for name, _ in BLOCK_TYPES.values()),
        *(n for n, _ in SUPERBLOCK_TYPES.values()),
    ]
)

_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INNER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# model_type of config.json -> the architecture's name, and whether q and k lie in the order of
# llama.cpp's rotary pairs
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "qwen.tiktoken", "vocab.json")
# far beyond any model, and read in seconds
_MOST_TENSORS, _MOST_KEYS, _MOST_STRINGS = 2**16, 2**16, 2**22
_LONGEST_NAME = 64  # ggml's
_ORIGINAL = "Start from the original checkpoint instead"
_REQUANTIZE = (
    "Start from the original checkpoint, or rewrite it with llama.cpp's llama-quantize"
    " --allow-requantize FILE OUT Q8_0"
)
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` is, or that lies in that directory; None where there is none.
    Raises ModelError for several."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise ModelError(
            Problem(
                str(path),
                f"{len(files)} .gguf files",
                "one",
                f"Name the one that is meant, such as {files[0]}",
            )
        )
    return files[0] if files else None


def read_metadata(path: Path) -> dict[str, Any]:
    """The keys and values of a GGUF file: numbers, strings, `array`s of numbers and lists of
    strings. Raises ModelError."""
    return _read_header(path)[0]


def to_gguf_name(module: str) -> str:
    """llama.cpp's name of a module: `blk.0.attn_q` for `model.layers.0.self_attn.q_proj`. KeyError
    for one that it has not."""
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
        return f"blk.{match[1]}.{_INNER[match[2]]}"
    return _OUTER[module]


def from_gguf_name(name: str) -> str | None:
    """The inverse of `to_gguf_name`; None for a name that is not known."""
    if match := re.fullmatch(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)", name):
        inner = next((ours for ours, theirs in _INNER.items() if theirs == match[2]), None)
        return inner and f"model.layers.{match[1]}.{inner}"
    return next((ours for ours, theirs in _OUTER.items() if theirs == name), None)


def to_rotary_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows `[heads * D, …]` of q or k (or their bias) from halves (channel `i` turns with `i +
    D/2`) to pairs that lie together."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def to_rotary_halves(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `to_rotary_pairs`."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def rotary_heads(module: str, config: Mapping[str, Any]) -> int:
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
    kind: int  # ggml's number of the type
    info: TensorInfo  # start and stop are places in the file


class Gguf:
    """A GGUF file as a checkpoint: plain tensors by their Hugging Face names, blocks as uint8 `[N,
    bytes]` under `{module}.q4_0` and the like, superblocks (Q4_K, Q5_K, Q6_K), whose grid no other
    format has, as plain float32. Raises ModelError for a damaged file, with all that is wrong, and
    for types and architectures that are not read."""

    notes: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [path]
        beside = any((path.parent / name).is_file() for name in _TOKENIZERS)
        self.tokenizer = path.parent if beside else path  # its metadata holds one too
        self.metadata, headers, base, size = _read_header(path)
        self._architecture = self._known_architecture()
        placed = _placed(path, headers, base, size)
        self._rope_factors = placed.pop("rope_freqs.weight", None)
        self._places: dict[str, _Place] = {}
        unknown = []
        for name, (kind, info) in placed.items():
            stem, _, part = name.rpartition(".")
            module = from_gguf_name(stem)
            if (
                module is None
                or part not in ("weight", "bias")
                or (part == "bias" and len(info.shape) != 1)
            ):
                unknown.append(name)
            else:
                self._places[
                    f"{module}.{BLOCK_TYPES[kind][0] if kind in BLOCK_TYPES else part}"
                ] = _Place(module, kind, info)
        if unknown:
            names = ", ".join(map(repr, unknown[:4])) + (
                f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
            )
            hint = "They would be lost: convert the original checkpoint"
            raise ModelError(
                Problem(
                    str(path),
                    f"tensors that a decoder of llama, qwen2 or qwen3 does not have: {names}",
                    hint=hint,
                )
            )
        self._vectors = self._dtype_of_vectors()
        self.tensors: Mapping[str, TensorInfo] = {
            name: self._info(place) for name, place in self._places.items()
        }
        self.config = self._config()
        self._check_rotary_rows()

    def read(self, name: str, index: int | slice | None = None) -> Tensor:
        place = self._places[name]
        info, heads = place.info, rotary_heads(place.module, self.config)
        if isinstance(index, slice) and not heads:  # whose rows lie in another order
            info, index = info.rows(index), None
        raw = self._read(info)
        if place.kind in SUPERBLOCK_TYPES:
            tensor = dequantize_superblocks(place.kind, raw).view(info.shape)
        else:
            tensor = raw.view(torch_dtype(info.dtype)).view(info.shape)
        if heads:
            tensor = to_rotary_halves(tensor, heads)
        if self.tensors[name].dtype != info.dtype:
            tensor, _ = converted(
                f"{self.path} tensor {name}",
                tensor,
                torch_dtype(self.tensors[name].dtype),
                rounded=False,
            )
        return tensor if index is None else tensor[index].clone()

    def _info(self, place: _Place) -> TensorInfo:
        """As it is handed over: vectors in the dtype that they had before they were written in
        float32."""
        info = place.info
        if len(info.shape) != 1 or info.dtype != "F32" or self._vectors == "F32":
            return info
        return TensorInfo(self._vectors, info.shape, 0, info.shape[0] * ITEM_BYTES[self._vectors])

    def _dtype_of_vectors(self) -> str:
        dtype = self.metadata.get(VECTORS_KEY, "F32")
        if dtype not in ("F32", "F16", "BF16"):
            raise ModelError(
                Problem(f"{self.path} {VECTORS_KEY}", f"{dtype!r}"[:80], "F32, F16 or BF16")
            )
        return str(dtype)

    def _read(self, info: TensorInfo) -> Tensor:
        """uint8: the bytes of a tensor."""
        import torch

        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        view = raw.numpy().data
        with open(self.path, "rb", buffering=0) as file:
            file.seek(info.start)
            if not read_full(file, view):
                raise ModelError(
                    Problem(
                        str(self.path), "the file ends inside a tensor", hint="Download it again"
                    )
                )
        return raw

    def _check_rotary_rows(self) -> None:
        """Or reading them would cut heads."""
        problems = []
        for name, place in self._places.items():
            heads = rotary_heads(place.module, self.config)
            if heads and place.info.shape[0] % (2 * heads):
                problems.append(
                    Problem(
                        f"{self.path} tensor {name}",
                        f"shape {list(place.info.shape)}",
                        f"pairs of rows in {heads} heads",
                    )
                )
        if problems:
            raise ModelError(problems)

    def kv_parameters(self) -> dict[str, Tensor]:
        return {}

    def _known_architecture(self) -> str:
        """`general.architecture`. Raises ModelError where the whole file is another thing than is
        read."""
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str) or name not in _CLASSES:
            problem = "missing" if name is None else f"{name!r}"[:80]
            raise ModelError(
                Problem(
                    f"{self.path} general.architecture", problem, f"one of {', '.join(_CLASSES)}"
                )
            )
        if self.metadata.get("split.count") not in (None, 0, 1):
            hint = "Join them with llama.cpp's llama-gguf-split --merge"
            raise ModelError(
                Problem(
                    str(self.path),
                    "one of several files of a model",
                    "the whole model in one",
                    hint,
                )
            )
        if self.metadata.get(f"{name}.expert_count"):
            raise ModelError(
                Problem(
                    str(self.path),
                    "a mixture of experts",
                    "a dense decoder",
                    "Start from the original checkpoint",
                )
            )
        return name

    def _config(self) -> dict[str, Any]:
        """What config.json would say."""
        own = self.metadata.get(CONFIG_KEY)
        config = self._own_config(own) if own is not None else self._standard_config()
        text = self.metadata.get(SCHEMES_KEY, "{}")
        try:
            schemes = json.loads(text) if isinstance(text, str) else None
        except (ValueError, RecursionError):
            schemes = None
        if not isinstance(schemes, dict):
            raise ModelError(
                Problem(f"{self.path} {SCHEMES_KEY}", f"{text!r}"[:80], "a JSON object")
            )
        types = {
            place.module: BLOCK_TYPES[place.kind][0]
            for place in self._places.values()
            if place.kind in BLOCK_TYPES
        }
        if types:
            known = {module: scheme for module, scheme in schemes.items() if module in types}
            config["quantization_config"] = {
                "quant_method": "gguf",
                "types": types,
                "schemes": known,
            }
        return config

    def _own_config(self, text: Any) -> dict[str, Any]:
        try:
            config = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise ModelError(
                Problem(f"{self.path} {CONFIG_KEY}", f"not JSON ({error})"[:200], "a JSON object")
            ) from error
        wrong = ModelError(
            Problem(
                f"{self.path} {CONFIG_KEY}",
                f"{text!r}"[:80],
                f"the config of a decoder of {self._architecture}",
            )
        )
        if (
            not isinstance(config, dict)
            or any(half_letters(config))
            or ARCHITECTURES.get(str(config.get("model_type")), ("",))[0] != self._architecture
        ):
            raise wrong
        heads = config.get("num_attention_heads")
        kv_heads = config.get("num_key_value_heads") or heads
        if not all(type(count) is int and count > 0 for count in (heads, kv_heads)):
            raise wrong
        config.pop("quantization_config", None)
        return config

    def _standard_config(self) -> dict[str, Any]:
        architecture = self._architecture
        problems: list[Problem] = []

        def value(key: str, kind: type, default: Any = None) -> Any:
            number: Any = self.metadata.get(f"{architecture}.{key}", default)
            if isinstance(number, array) and len(set(number)) == 1:  # one for each layer
                number = number[0]
            if kind is float and type(number) is int:
                number = float(number)
            wrong = type(number) is not kind
            if wrong or not 0 < number < 2**31:
                expected = f"a positive {kind.__name__}"
                problems.append(
                    Problem(
                        f"{self.path} {architecture}.{key}",
                        "missing" if number is None else f"{number!r}"[:80],
                        expected,
                    )
                )
                return kind(1)
            return number

        # The shape of the heads.
        heads, hidden = value("attention.head_count", int), value("embedding_length", int)
        head_dim = value("attention.key_length", int, max(1, hidden // heads))
        for key in ("attention.value_length", "rope.dimension_count"):
            if value(key, int, head_dim) != head_dim:
                stated = repr(self.metadata.get(f"{architecture}.{key}"))
                problems.append(
                    Problem(
                        f"{self.path} {architecture}.{key}",
                        stated[:80],
                        f"the whole head, {head_dim}",
                    )
                )
        # What transformers' config.json would say.
        embedding = self._places.get("model.embed_tokens.weight")
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        config: dict[str, Any] = {
            "architectures": [_CLASSES[architecture]],
            "model_type": architecture,
            "hidden_size": hidden,
            "intermediate_size": value("feed_forward_length", int),
            "num_hidden_layers": value("block_count", int),
            "num_attention_heads": heads,
            "num_key_value_heads": value("attention.head_count_kv", int, heads),
            "head_dim": head_dim,
            "max_position_embeddings": value("context_length", int),
            "rms_norm_eps": value("attention.layer_norm_rms_epsilon", float),
            "rope_theta": value("rope.freq_base", float, 10000.0),
            "vocab_size": value(
                "vocab_size", int, len(tokens) if isinstance(tokens, list) else None
            ),
            "hidden_act": "silu",
            "tie_word_embeddings": not any(
                place.module == "lm_head" for place in self._places.values()
            ),
            "torch_dtype": (
                {0: "float32", 30: "bfloat16"}.get(embedding.kind if embedding else 1, "float16")
            ),
        }
        if architecture == "llama":
            config["attention_bias"] = "model.layers.0.self_attn.o_proj.bias" in self._places
        # How the rotary embedding is scaled.
        kind = self.metadata.get(f"{architecture}.rope.scaling.type", "none")
        if self._rope_factors is not None:
            scaling = (
                self._llama3_scaling(config["rope_theta"], head_dim) if kind == "none" else None
            )
            if scaling is None:
                problems.append(
                    Problem(
                        f"{self.path} rope_freqs.weight",
                        "other factors than Llama 3's",
                        hint=_ORIGINAL,
                    )
                )
            config["rope_scaling"] = scaling
        elif kind in ("linear", "yarn"):
            config["rope_scaling"] = {
                "rope_type": kind,
                "factor": value("rope.scaling.factor", float),
            }
            if (
                kind == "yarn"
                or f"{architecture}.rope.scaling.original_context_length" in self.metadata
            ):
                config["rope_scaling"]["original_max_position_embeddings"] = value(
                    "rope.scaling.original_context_length", int
                )
        elif kind != "none":
            problems.append(
                Problem(
                    f"{self.path} {architecture}.rope.scaling.type",
                    f"{kind!r}"[:80],
                    "none, linear or yarn",
                    _ORIGINAL,
                )
            )
        # The tokens that begin and end a text.
        for role in ("bos", "eos"):
            token = self.metadata.get(f"tokenizer.ggml.{role}_token_id")
            if type(token) is int:
                config[f"{role}_token_id"] = token
        if problems:
            raise ModelError(problems)
        return config

    def _llama3_scaling(self, theta: float, head_dim: int) -> dict[str, Any] | None:
        """The `rope_scaling` that gives the file's factors, with the wavelengths of every Llama 3
        since 3.1; None if there is none."""
        import torch

        assert self._rope_factors is not None
        kind, info = self._rope_factors
        if kind != 0:
            return None
        factors = self._read(info).view(torch.float32)
        numbers = {
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        if not 1 <= numbers["factor"] < 2**31:
            return None
        expected = llama3_factors(theta, head_dim, numbers)
        same = expected.shape == factors.shape and torch.allclose(
            expected, factors, rtol=1e-4, atol=0
        )
        return {"rope_type": "llama3", **numbers} if same else None


_NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_DAMAGED = "The file is damaged or incomplete: copy or download it again"


class _Reader:
    """The bytes of a header, none of which are believed before they are there."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file = path, file
        self.left = min(size, MAX_HEADER_BYTES)

    def wrong(
        self, problem: str, expected: str = "a GGUF file", hint: str = _DAMAGED
    ) -> ModelError:
        return ModelError(Problem(str(self.path), problem, expected, hint))

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise self.wrong(f"the file ends {count - self.left} bytes inside its header")
        self.left -= count
        taken = self.file.read(count)
        if len(taken) < count:
            raise self.wrong("the file shrinks while it is read")
        return taken

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def text(self, errors: str = "strict") -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise self.wrong("a name or text that is no UTF-8") from error

    def count(self, least: int, most: int = MAX_HEADER_BYTES) -> int:
        """A number of things of at least `least` bytes each."""
        count = int(self.number("Q"))
        if count * least > self.left or count > most:
            raise self.wrong(f"a header that promises {count} entries in {self.left} bytes")
        return count

    def value(self) -> Any:
        """A bool, number or string; numbers of an array as an `array`, its strings as a list."""
        kind = self.number("I")
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == 8:
            return self.text()
        item = self.number("I") if kind == 9 else None
        if item in _NUMBERS:
            form = _NUMBERS[item].replace("?", "B")
            size = struct.calcsize("<" + form)
            numbers = array(form, self.take(self.count(size) * size))
            if sys.byteorder == "big":
                numbers.byteswap()
            return numbers
        if item == 8:
            return [
                self.text("surrogateescape") for _ in range(self.count(8, _MOST_STRINGS))
            ]  # tokens of some vocabularies are no whole letters
        raise self.wrong(
            f"a metadata value of type {kind}" + (f" of {item}" if kind == 9 else ""),
            "numbers, strings or an array of them",
        )


# shape, ggml's number of the type, place behind the header
_Header = tuple[tuple[int, ...], int, int]


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, _Header], int, int]:
    """Metadata, the headers of the tensors, where their bytes begin, and how many bytes the file
    has."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            reader = _Reader(path, file, size)
            magic = reader.take(min(4, size))
            if magic != MAGIC:
                if problem := placeholder_at(path, binary=True):
                    raise ModelError(problem)
                raise reader.wrong(f"the first bytes are {magic!r}", f"{MAGIC!r}", _DAMAGED)
            version = reader.number("I")
            if version not in (2, 3):
                swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
                claim = f"version {version}" if swapped > VERSION else "a big-endian file"
                raise reader.wrong(
                    claim,
                    "version 2 or 3, little-endian",
                    "Convert the original checkpoint with a newer llama.cpp",
                )
            tensor_count, metadata_count = (
                reader.count(24, _MOST_TENSORS),
                reader.count(13, _MOST_KEYS),
            )
            metadata: dict[str, Any] = {}
            for _ in range(metadata_count):
                key = reader.text()
                if key in metadata:
                    raise reader.wrong(f"the key {key!r} stands there twice"[:200])
                metadata[key] = reader.value()
            headers: dict[str, _Header] = {}
            for _ in range(tensor_count):
                name, dims = reader.text(), reader.number("I")
                if len(name) > _LONGEST_NAME or name in headers or not 0 < dims <= 4:
                    claim = (
                        f"tensor {name[:_LONGEST_NAME]!r} has {dims} dimensions, stands there twice"
                        " or has too long a name"
                    )
                    raise reader.wrong(claim, "1 to 4, once")
                shape = tuple(reader.number("Q") for _ in range(dims))
                headers[name] = (shape[::-1], reader.number("I"), reader.number("Q"))
            at = file.tell()
    except OSError as error:
        raise ModelError(
            Problem(str(path), error.strerror or str(error), "a readable GGUF file")
        ) from error
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
        raise reader.wrong(f"general.alignment {alignment!r}"[:80], "a power of two")
    return metadata, headers, at + -at % alignment, size


def _placed(
    path: Path, headers: Mapping[str, _Header], base: int, size: int
) -> dict[str, tuple[int, TensorInfo]]:
    """ggml's number of the type, and dtype, shape and place as `TensorFile` has them, of every
    tensor."""
    placed: dict[str, tuple[int, TensorInfo]] = {}
    problems: list[Problem] = []
    strange: dict[str, list[str]] = {}
    # Each tensor's bytes, from its type and shape.
    for name, (shape, kind, offset) in headers.items():
        dtype = PLAIN_TYPES.get(kind, "F32")
        if kind in PLAIN_TYPES:
            nbytes = math.prod(shape) * ITEM_BYTES[dtype]
        elif kind in BLOCK_TYPES and len(shape) == 2 and shape[1] % BLOCK == 0:
            dtype, shape = "U8", (shape[0], shape[1] // BLOCK * BLOCK_TYPES[kind][1])
            nbytes = math.prod(shape)
        elif kind in SUPERBLOCK_TYPES and len(shape) == 2 and shape[1] % SUPERBLOCK == 0:
            nbytes = math.prod(shape) // SUPERBLOCK * SUPERBLOCK_TYPES[kind][1]
        elif kind in BLOCK_TYPES or kind in SUPERBLOCK_TYPES:
            problems.append(
                Problem(
                    f"{path} tensor {name!r}",
                    f"shape {list(shape)} in blocks",
                    "two dimensions of whole blocks",
                )
            )
            continue
        else:
            strange.setdefault(_OTHER_TYPES.get(kind, f"{kind}"), []).append(name)
            continue
        start = base + offset
        if nbytes == 0 or start + nbytes > size:
            expected = f"a tensor within the file's {size}"
            problems.append(
                Problem(
                    f"{path} tensor {name!r}",
                    f"{nbytes} bytes from byte {start}",
                    expected,
                    "Download it again",
                )
            )
        placed[name] = (kind, TensorInfo(dtype, shape, start, start + nbytes))
    # One problem for each type that is not read, not for each tensor.
    for kind_name, names in strange.items():
        such = f"{len(names)} tensors of type {kind_name}, the first of which is {names[0]!r}"
        problems.append(Problem(str(path), such, f"one of {_READ_TYPES}", _REQUANTIZE))
    # Tensors may not overlap.
    at, last = base, ""
    for name, (_, info) in sorted(placed.items(), key=lambda item: item[1][1].start):
        if info.start < at:
            problems.append(
                Problem(
                    f"{path} tensor {name!r}",
                    f"it overlaps with {last!r}",
                    "tensors one after the other",
                )
            )
        at, last = info.stop, name
    if problems:
        more = len(problems) - 20
        raise ModelError(
            problems[:20] + ([Problem(str(path), f"{more} more such problems")] if more > 0 else [])
        )
    return placed


def llama3_factors(theta: float, head_dim: int, p: Mapping[str, float]) -> Tensor:
    import torch

    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    waves = 2 * math.pi / frequencies
    trained, low, high = (
        p["original_max_position_embeddings"],
        p["low_freq_factor"],
        p["high_freq_factor"],
    )
    smooth = ((trained / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / p["factor"] + smooth)).float()
