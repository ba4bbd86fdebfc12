"""GGUF, llama.cpp's file of metadata and tensors, as a checkpoint: read one tensor at a time.
`writer.py` writes it.

The layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tensors go by their Hugging
Face names here. llama.cpp's own names (`names.py`), the order of rotary channels in q and k of its
`llama` architecture (`rotary.py`), and the blocks of each type (`types.py`) are this folder's
business; what the codes in a block mean is `formats/gguf.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantflow.checkpoints.gguf.config import (
    CONFIG_KEY,
    VECTORS_KEY,
    known_architecture,
    own_config,
    schemes_of,
    standard_config,
)
from quantflow.checkpoints.gguf.header import places, read_header
from quantflow.checkpoints.gguf.names import FAMILIES, from_gguf_name
from quantflow.checkpoints.gguf.rotary import rotary_heads, to_rotary_halves
from quantflow.checkpoints.gguf.superblocks import SUPERBLOCK_TYPES, dequantize_superblocks
from quantflow.checkpoints.gguf.types import BLOCK_TYPES, PLAIN_TYPES
from quantflow.checkpoints.rounding import converted
from quantflow.checkpoints.tensor_file import ITEM_BYTES, TensorInfo, read_full, torch_dtype
from quantflow.errors import ModelError, Problem

if TYPE_CHECKING:
    from torch import Tensor

NAME = "model.gguf"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "qwen.tiktoken", "vocab.json")


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
        header = read_header(path)
        self.metadata = header.metadata
        architecture = known_architecture(path, self.metadata)
        in_file = places(path, header)
        factors = in_file.pop("rope_freqs.weight", None)
        self._places: dict[str, _Place] = {}
        unknown = []
        for name, (kind, info) in in_file.items():
            stem, _, part = name.rpartition(".")
            module = from_gguf_name(stem, architecture)
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
        self.config = self._config(architecture, factors)
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
        family = FAMILIES[str(self.config["model_type"])]
        if family.adds_one and place.module.endswith("norm"):
            tensor = (tensor - 1).to(torch_dtype(self.tensors[name].dtype))
            return tensor if index is None else tensor[index].clone()
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

    def _config(self, architecture: str, factors: tuple[int, TensorInfo] | None) -> dict[str, Any]:
        """What config.json would say. factors: where those of the rotary embedding are, if the
        file has them, and ggml's number of their type."""
        own = self.metadata.get(CONFIG_KEY)
        if own is not None:
            config = own_config(self.path, own, architecture)
        else:
            kinds = {name: place.kind for name, place in self._places.items()}
            numbers = None
            if factors is not None:
                kind, info = factors
                data = self._read(info)
                numbers = data.view(torch_dtype("F32")) if PLAIN_TYPES.get(kind) == "F32" else data
            config = standard_config(self.path, self.metadata, architecture, kinds, numbers)
        schemes = schemes_of(self.path, self.metadata)
        types = {
            place.module: BLOCK_TYPES[place.kind][0]
            for place in self._places.values()
            if place.kind in BLOCK_TYPES
        }
        if types:
            config["quantization_config"] = {
                "quant_method": "gguf",
                "types": types,
                "schemes": {m: scheme for m, scheme in schemes.items() if m in types},
            }
        return config
