"""The weights of any checkpoint QuantFlow reads, full-precision or quantised, as the decoder wants them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from quantflow.errors import ModelError, Problem
from quantflow.formats import FORMATS, detect
from quantflow.formats.base import Format
from quantflow.models.checkpoint import Checkpoint, read_json

if TYPE_CHECKING:
    from torch import Tensor

    from quantflow.quant.grid import QuantizedTensor

MANIFEST = "quantflow.json"


def checkpoint_folder(path: Path) -> Path:
    """The directory that holds the checkpoint: `path`, or the first format of an artifact that holds several."""
    if not (path / "config.json").is_file() and (path / MANIFEST).is_file():
        folders = read_json(path / MANIFEST).get("formats")
        if isinstance(folders, dict) and folders:
            return path / str(next(iter(folders.values())))
    return path


class Weights:
    """A checkpoint's weights under native names, dequantised where it is quantised.

    Raises ModelError for a checkpoint that is neither whole nor in a format QuantFlow reads.
    """

    def __init__(self, path: Path) -> None:
        self.checkpoint = Checkpoint(checkpoint_folder(path))
        name = detect(self.checkpoint.raw_config)
        self.format: Format | None = FORMATS[name] if name else None
        self._config = self.checkpoint.quantization or {}
        problems = [p for p in self.checkpoint.problems() if self.format is None]
        if self.format:
            missing = [n for n in self.checkpoint.expected if n not in self.checkpoint.sources and not self.is_quantised(n)]
            if missing:
                shown = ", ".join(missing[:4])
                problems.append(Problem(str(path), f"{len(missing)} tensors are missing: {shown}", "a whole checkpoint"))
        if problems:
            raise ModelError(problems)

    @cached_property
    def modules(self) -> set[str]:
        """The quantised modules."""
        if not self.format:
            return set()
        suffix = self.format.suffixes[0]
        return {n.removesuffix(suffix) for n in self.checkpoint.source_names if n.endswith(suffix)}

    def is_quantised(self, name: str) -> bool:
        return name.endswith(".weight") and name.removesuffix(".weight") in self.modules

    def quantized(self, module: str) -> QuantizedTensor:
        """The canonical tensor of a quantised module."""
        assert self.format is not None
        names = [f"{module}{suffix}" for suffix in self.format.suffixes]
        present = set(self.checkpoint.source_names)
        tensors = {n: self.checkpoint.read_source(n) for n in names if n in present}
        return self.format.decode(module, tensors, self._config)

    def tensor(self, name: str) -> Tensor:
        """A native tensor in float32 if it is quantised, else as stored."""
        if self.is_quantised(name):
            return self.quantized(name.removesuffix(".weight")).dequantize()
        return self.checkpoint.tensor(name)

    def layer(self, index: int) -> dict[str, Tensor]:
        prefix = self.checkpoint.architecture.layer_prefix(index) + "."
        return {n.removeprefix(prefix): self.tensor(n) for n in self.checkpoint.layer_names(index)}

    def outer(self) -> dict[str, Tensor]:
        return {n: self.tensor(n) for n in self.checkpoint.outer_names()}
