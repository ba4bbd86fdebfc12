"""Where a checkpoint's config and tensors lie: a Hugging Face directory, a GGUF file, a TurboMind
workspace."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quantflow.checkpoints.directory import Directory
from quantflow.checkpoints.gguf.file import Gguf, gguf_file
from quantflow.checkpoints.tensor_file import TensorInfo
from quantflow.checkpoints.turbomind.files import is_workspace
from quantflow.checkpoints.turbomind.workspace import Workspace

if TYPE_CHECKING:
    from torch import Tensor


class Container(Protocol):
    """A checkpoint's files, read one tensor at a time."""

    @property
    def config(self) -> dict[str, Any]:
        """config.json, or what says the same."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors under the names that a Hugging Face checkpoint has; where a packed layout is
        read in parts, the parts."""

    @property
    def files(self) -> list[Path]:
        """The weight files, sorted."""

    @property
    def tokenizer(self) -> Path:
        """The directory with the tokenizer's files."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how the tensors are stored."""

    def read(self, name: str, index: int | slice | None = None) -> Tensor:
        """The tensor `name`, or one or some of its slices along the first dimension, freshly
        allocated on the CPU. Raises ModelError."""

    def kv_parameters(self) -> dict[str, Tensor]:
        """Scales and zero points of the KV cache that the container itself holds, named as in
        `kv_qparams.safetensors`."""


def open_container(path: Path, *, config_only: bool = False) -> Container:
    """The container at `path`, a file or a directory. config_only: the weight files need not be
    there. Raises ModelError."""
    if not (path / "config.json").is_file():
        if is_workspace(path):
            return Workspace(path)
        if file := gguf_file(path):
            return Gguf(file)
    return Directory(path, config_only=config_only)
