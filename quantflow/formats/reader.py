"""The weights of any checkpoint QuantFlow reads, full-precision or quantised, as the decoder wants
them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.checkpoints.directory import is_place, read_json
from quantflow.checkpoints.gguf.file import gguf_file
from quantflow.checkpoints.turbomind.files import is_workspace
from quantflow.errors import ModelError, Problem
from quantflow.formats import FORMATS
from quantflow.formats.base import Format
from quantflow.formats.huggingface import HuggingFace
from quantflow.formats.recognise import recognise

if TYPE_CHECKING:
    from torch import Tensor

    from quantflow.quant.numbers import QuantizedTensor
    from quantflow.quant.scheme import Scheme

MANIFEST = "quantflow.json"
REQUANTIZED = "requantized.json"  # beside a checkpoint that is no exact translation
# of a KV cache that others calibrated
KV_SUFFIXES = (".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point")


def checkpoint_folder(path: Path) -> Path:
    """The directory that holds the checkpoint: `path`, or the first of an artifact's several
    formats that is an exact one.

    Raises ModelError for an artifact that holds none, only `calibrate`'s statistics."""
    if (
        not (path / "config.json").is_file()
        and not gguf_file(path)
        and not is_workspace(path)
        and (path / MANIFEST).is_file()
    ):
        folders = read_json(path / MANIFEST).get("formats")
        if folders == {}:
            hint = "Its recipe has no pack stage: calibration.safetensors is all that it made"
            raise ModelError(
                Problem(
                    str(path),
                    "an artifact of statistics alone",
                    "one that holds a checkpoint",
                    hint,
                )
            )
        if isinstance(folders, dict) and folders:
            if outside := [place for place in folders.values() if not is_place(place)]:
                raise ModelError(
                    Problem(
                        f"{path / MANIFEST} formats",
                        f"{outside[0]!r}"[:200],
                        "a folder of the artifact",
                    )
                )

            def changed(name: str) -> tuple[bool, bool]:
                """Whether what was quantised is held inexactly, or its codes are gone."""
                dequantised = name in FORMATS and not FORMATS[name].keeps_codes
                return (path / folders[name] / REQUANTIZED).is_file(), dequantised

            return Path(path / folders[min(folders, key=changed)])
    return path


class Weights:
    """A checkpoint's weights under native names, dequantised where it is quantised.

    tp: `path` holds one of that many tensor-parallel ranks, as `shard` writes them. Raises
    ModelError for a checkpoint that is neither whole nor in a format QuantFlow reads.
    """

    def __init__(self, path: Path, *, tp: int = 1) -> None:
        self.checkpoint = Checkpoint(checkpoint_folder(path), tp=tp)
        recognised = recognise(self.checkpoint)
        self.format: Format | None = FORMATS[recognised[0]] if recognised else None
        self._config = recognised[1] if recognised else {}
        ranks = self.checkpoint.path / "tensor_parallel.json"
        number = read_json(ranks).get("tensor_parallel") if ranks.is_file() else 1
        if number != tp:
            expected = "a whole checkpoint" if tp == 1 else f"one of {tp}"
            raise ModelError(Problem(str(path), f"one of {number} tensor-parallel ranks", expected))
        problems = self.checkpoint.problems(self._belongs)
        names = self.checkpoint.container.tensors
        for module in sorted(self.modules):
            if f"{module}.weight" in self.checkpoint.expected and self.scheme_of(module) is None:
                hint = (
                    "Is it in the list of modules that are not converted, or not in that of"
                    " targets?"
                )
                problems.append(
                    Problem(
                        f"{path} {module}",
                        "packed tensors, and a quantization_config that leaves it alone",
                        hint=hint,
                    )
                )
            if (
                f"{module}.weight" in names
                and self.format
                and ".weight" not in self.format.suffixes
            ):
                problems.append(
                    Problem(
                        f"{path} {module}",
                        "packed tensors, and a plain weight beside them",
                        "one of the two",
                    )
                )
        if problems:
            raise ModelError(problems)

    @cached_property
    def modules(self) -> set[str]:
        """The quantised modules."""
        marks = self.format.marks if self.format else ()
        names = [
            name
            for name in self.checkpoint.source_names
            if name not in self.checkpoint.left_out and name not in self.checkpoint.copied
        ]
        return {n.removesuffix(mark) for n in names for mark in marks if n.endswith(mark)}

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Source tensor -> why nothing is read from it: the checkpoint's own, and what belongs to
        its format without being weights."""
        reasons = dict(self.checkpoint.left_out)
        kind = self.kv_scales
        read = KV_SUFFIXES[:2] if kind == "int8" else ()
        for name in self.checkpoint.source_names:
            if name in reasons or name in self.checkpoint.expected or self.format is None:
                continue
            if name.endswith(KV_SUFFIXES) and not name.endswith(read):
                reasons[name] = (
                    f"a scale of a KV cache ({kind})"
                    if kind
                    else "a scale of a KV cache that quantization_config is silent on"
                )
            elif name.endswith(".bias") and name.removesuffix(".bias") in self.modules:
                reasons[name] = "zeros, where the model has no bias"
        return reasons

    @property
    def format_name(self) -> str:
        """As a recipe calls it, also of a plain checkpoint."""
        return (self.format or HuggingFace()).name

    @cached_property
    def indexed(self) -> set[str]:
        """Modules whose channels are not in the order of their groups."""
        modules = set()
        for suffix in self.format.index_suffixes if self.format else ():
            for module in self.modules:
                name = f"{module}{suffix}"
                if name in self.checkpoint.container.tensors:
                    index = self.checkpoint.read_source(name)
                    if bool((index[1:] < index[:-1]).any()):
                        modules.add(module)
        return modules

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of a module by the configuration; None for one that is not quantised. Raises
        FormatError."""
        return (
            self.format.scheme_of(module, self._config)
            if self.format and module in self.modules
            else None
        )

    def is_quantised(self, name: str) -> bool:
        return name.endswith(".weight") and name.removesuffix(".weight") in self.modules

    def _belongs(self, name: str) -> bool:
        """Whether a tensor is part of a quantised module, or the weight of one."""
        if self.format is None:
            return False
        module = name.removesuffix(".bias")
        if module != name and module in self.modules:  # GPTQ's writers add biases of zeros
            return f"{module}.bias" not in self.checkpoint.expected and not bool(
                self.checkpoint.read_source(name).any()
            )
        parts = (".weight", *self.format.suffixes)
        return name.endswith(KV_SUFFIXES) or any(
            name.removesuffix(p) in self.modules for p in parts if name.endswith(p)
        )

    def quantized(self, module: str) -> QuantizedTensor:
        """The canonical tensor of a quantised module. Raises ModelError where it does not fit the
        model, or is not finite."""
        assert self.format is not None
        names = [f"{module}{suffix}" for suffix in self.format.suffixes]
        tensors = {
            n: self.checkpoint.read_source(n)
            for n in names
            if n in self.checkpoint.container.tensors
        }
        tensor = self.format.decode(module, tensors, self._config)
        expected = self.checkpoint.expected.get(f"{module}.weight")
        if tensor.shape != expected:
            problem = f"shape {list(tensor.shape)}"
            raise ModelError(
                Problem(
                    f"{self.checkpoint.path} {module}",
                    problem,
                    f"{list(expected or ())} by config.json",
                )
            )
        if not bool(tensor.scales.isfinite().all()):
            raise ModelError(
                Problem(
                    f"{self.checkpoint.path} {module}",
                    "scales that are NaN or infinite",
                    "finite scales",
                )
            )
        return tensor

    def kv_parameters(self) -> dict[str, Tensor]:
        """Scales and zero points of the KV cache that the checkpoint itself holds, named as in
        `kv_qparams.safetensors`; {} without any."""
        if self.kv_scales != "int8":
            own, heads = self.checkpoint.container.kv_parameters(), self.checkpoint.config.kv_heads
            # one a rank: its heads share it
            return {
                n: t.repeat_interleave(heads // len(t)) if t.dim() else t for n, t in own.items()
            }
        parameters: dict[str, Tensor] = {}
        for name, scale in self._stored_kv_scales().items():
            parameters[name] = scale.float().reshape(())
            parameters[f"{name.removesuffix('scale')}zero_point"] = parameters[name].new_zeros(())
        return parameters

    @cached_property
    def kv_scales(self) -> str | None:
        """The KV scales that lie among the weights: None, `int8`, `fp8`, or other ones in words."""
        return self.format.stored_kv_scales(self._config) if self.format else None

    def fp8_scales(self) -> dict[str, Tensor]:
        """`…self_attn.k_scale` and `v_scale` of every layer as stored, one number each, where
        `kv_scales` is `fp8`; else {}."""
        return self._stored_kv_scales() if self.kv_scales == "fp8" else {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the family, and of how the checkpoint is stored."""
        if self.kv_scales in (None, "int8"):
            return self.checkpoint.notes
        unused = (
            f"scales of a KV cache among the weights ({self.kv_scales}): the engine here has no"
            " such cache, and leaves them alone"
        )
        return (*self.checkpoint.notes, unused)

    def _stored_kv_scales(self) -> dict[str, Tensor]:
        scales: dict[str, Tensor] = {}
        present = self.checkpoint.container.tensors
        for index in self.checkpoint.cached_layers:
            for part in "kv":
                name = f"{self.checkpoint.attention(index)}.{part}_scale"
                scale = self.checkpoint.read_source(name) if name in present else None
                if (
                    scale is None
                    or scale.numel() != 1
                    or not bool(scale > 0)
                    or not bool(scale.isfinite())
                ):
                    place = f"{self.checkpoint.path} {name}"
                    raise ModelError(
                        Problem(
                            place,
                            "missing, or no scale",
                            "one finite number above 0, says kv_cache_scheme",
                        )
                    )
                scales[name] = scale
        return scales

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
