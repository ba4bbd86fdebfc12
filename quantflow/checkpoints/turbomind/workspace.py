"""TurboMind workspaces, as LMDeploy v0.1 lays them out: one raw file a tensor and rank, and a
config.ini beside them.

`Workspace` gives back the native Llama tensors that a writer took (`writer.py`), ranks joined and
every permutation undone. One tensor, or the few that are fused into one file, is in memory at a
time. Nothing that is read is executed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from quantflow.checkpoints.tensor_file import ITEM_BYTES, TensorInfo, read_full, torch_dtype
from quantflow.checkpoints.turbomind.config import CONFIG, WEIGHTS, read_ini
from quantflow.checkpoints.turbomind.files import (
    KV_PARTS,
    TOKENIZER,
    kv_file,
    kv_name,
    weight_files,
)
from quantflow.checkpoints.turbomind.layout import Stored, decode, native_specs, stored_tensors
from quantflow.checkpoints.turbomind.permutations import has_plain_zeros
from quantflow.errors import ModelError, Problem
from quantflow.placeholder import placeholder_at

if TYPE_CHECKING:
    from torch import Tensor


class Workspace:
    """A workspace as a checkpoint: `config` is a Llama config.json, `tensors` the native tensors,
    whole whatever the ranks.

    The constructor reads config.ini and the sizes of the files, never a weight. Raises ModelError
    with every problem of config.ini or, once that is understood, in the files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokenizer = path / TOKENIZER
        self._weights = path / WEIGHTS
        self.model_name, self.layout, self.config, self._kv_ranks = read_ini(self._weights / CONFIG)
        self.tp = self.layout.tp
        sizes, problems = weight_files(path)
        self.files, self._kv_width, more = self._check_files(sizes)
        if problems or more:
            raise ModelError(problems + more)
        self._strangers = sorted(sizes.keys() - {file.name for file in self.files} - {CONFIG})
        self._stored: dict[str, Stored] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for stored in stored_tensors(self.layout):
            for name, (dtype, shape) in native_specs(self.layout, stored).items():
                if all(file in sizes for file in stored.files):
                    self.tensors[name] = TensorInfo(
                        dtype, shape, 0, math.prod(shape) * ITEM_BYTES[dtype]
                    )
                    self._stored[name] = stored
        if self.layout.bias and "model.layers.0.self_attn.o_proj.bias" not in self.tensors:
            # A Llama has the bias on o where q, k and v have one. Qwen2 is the same decoder without
            # it.
            del self.config["attention_bias"]
            self.config.update(
                architectures=["Qwen2ForCausalLM"], model_type="qwen2", use_sliding_window=False
            )
        # of the file that was read last, those that nobody has asked for
        self._parts: dict[str, Tensor] = {}

    def _check_files(self, sizes: Mapping[str, int]) -> tuple[list[Path], int, list[Problem]]:
        """The weight files, how many numbers a KV file holds, and what is missing or has the wrong
        size.

        sizes: name -> bytes. What config.ini claims is compared with it file by file, and no
        further than it can be true.
        """
        optional = set()
        if self.layout.bias:
            biases = [
                f"layers.{i}.attention.wo.{rank}.bias" for i, rank in self._layer_ranks(sizes)
            ]
            if not any(name in sizes for name in biases):
                optional = set(biases)
        missing, problems, files = [], [], []
        kv_width = 4 if self._kv_ranks and sizes.get(kv_file(0, 0)) == 16 else 2
        limit = len(sizes) + len(optional) + 5
        for name, nbytes in islice(self._expected_files(kv_width), limit):
            if name in optional:
                continue
            if name not in sizes:
                missing.append(name)
            elif sizes[name] != nbytes:
                wrong = Problem(
                    str(self._weights / name),
                    f"{sizes[name]} bytes",
                    f"{nbytes} by {CONFIG}",
                    "Is it cut off?",
                )
                problems.append(placeholder_at(self._weights / name) or wrong)
            files.append(self._weights / name)
        if missing:
            text = ", ".join(missing[:4]) + (" and more" if len(missing) > 4 else "")
            problems.append(
                Problem(
                    str(self._weights),
                    f"missing files: {text}",
                    hint=f"Is {CONFIG} another model's?",
                )
            )
        return sorted(files), kv_width, problems

    def _layer_ranks(self, sizes: Mapping[str, int]) -> Iterator[tuple[int, int]]:
        """Layers and ranks, as many as there can be files of."""
        return islice(
            ((i, rank) for i in range(self.layout.layers) for rank in range(self.tp)),
            len(sizes) + 5,
        )

    def _expected_files(self, kv_width: int) -> Iterator[tuple[str, int]]:
        for stored in stored_tensors(self.layout):
            yield from ((name, stored.nbytes) for name in stored.files)
        for i in range(self.layout.layers if self._kv_ranks else 0):
            yield from ((kv_file(i, rank), 4 * kv_width) for rank in range(self.tp))

    def read(self, name: str, index: int | slice | None = None) -> Tensor:
        """The native tensor `name`, or one or some of its slices along the first dimension, freshly
        allocated on the CPU.

        Raises ModelError for a file that changed meanwhile, and for zero points that are none.
        """
        stored = self._stored[name]
        # a table, which lies there row by row
        if isinstance(index, slice) and not stored.ranks and len(stored.shape) == 2:
            return self._read_file(
                stored.files[0],
                stored.dtype,
                stored.shape,
                range(*index.indices(self.layout.vocabulary)),
            )
        if name not in self._parts:
            self._parts = {}
            ranks = [self._read_file(file, stored.dtype, stored.shape) for file in stored.files]
            try:
                self._parts = decode(stored, self.layout, ranks)
            except ValueError as error:
                raise ModelError(
                    Problem(str(self._weights / stored.files[0]), str(error), hint="It is damaged")
                ) from error
        tensor = self._parts.pop(name)
        return tensor if index is None else tensor[index].clone()

    def kv_parameters(self) -> dict[str, Tensor]:
        """Scales and zero points of an int8 KV cache in float32 under their native names: `[]`, or
        `[tp]` where ranks differ.

        {} without one. Raises ModelError for numbers that are no scales.
        """
        import torch

        parameters: dict[str, Tensor] = {}
        problems = []
        for i in range(self.layout.layers if self._kv_ranks else 0):
            ranks = torch.stack(
                [
                    self._read_file(kv_file(i, rank), "F32", (self._kv_width,))
                    for rank in range(self.tp)
                ]
            )
            if self._kv_width == 2:
                ranks = torch.stack(
                    (ranks[:, 0], torch.zeros(self.tp), ranks[:, 1], torch.zeros(self.tp)), 1
                )
            if not bool(ranks.isfinite().all()) or not bool((ranks[:, ::2] > 0).all()):
                problems.append(
                    Problem(
                        str(self._weights / kv_file(i, 0)),
                        f"{ranks.tolist()}",
                        "finite numbers, scales above 0",
                    )
                )
            for part, values in zip(KV_PARTS, ranks.unbind(1), strict=True):
                parameters[kv_name(i, part)] = (
                    values[0].clone() if bool((values == values[0]).all()) else values.clone()
                )
        if problems:
            raise ModelError(problems)
        return parameters

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Of files that config.ini does not ask for; and where zero points are stored plainly,
        which LMDeploy takes for others: in how many of the files. Reads a number of each.

        Raises ModelError for a file that cannot be read.
        """
        notes: tuple[str, ...] = ()
        if self._strangers:
            few = ", ".join(self._strangers[:3]) + (
                f" and {len(self._strangers) - 3} more" if len(self._strangers) > 3 else ""
            )
            notes = (f"left out, since config.ini does not ask for them: {few}",)
        grids = [
            file
            for stored in stored_tensors(self.layout)
            if stored.part == "scales_zeros"
            for file in stored.files
        ]
        plain = [name for name in grids if has_plain_zeros(self._read_file(name, "F16", (1,)))]
        if not plain:
            return notes
        number = "all" if len(plain) == len(grids) else f"{len(plain)} of {len(grids)}"
        older = (
            f"{number} scales_zeros files hold zero points as z, from an older QuantFlow: right"
            " here, wrong in LMDeploy, which takes 64 + z; export it to turbomind again for that"
        )
        return (*notes, older)

    def _read_file(
        self, name: str, dtype: str, shape: tuple[int, ...], rows: range | None = None
    ) -> Tensor:
        import torch

        start = 0
        if rows is not None:
            start, shape = (
                rows.start * math.prod(shape[1:]) * ITEM_BYTES[dtype],
                (len(rows), *shape[1:]),
            )
        tensor = torch.empty(shape, dtype=torch_dtype(dtype))
        view = tensor.view(-1).view(torch.uint8).numpy().data
        try:
            with open(self._weights / name, "rb", buffering=0) as file:
                file.seek(start)
                if not read_full(file, view):
                    raise ModelError(
                        Problem(
                            str(self._weights / name),
                            "the file ends inside the tensor",
                            hint="Copy it again",
                        )
                    )
        except OSError as error:
            raise ModelError(
                Problem(str(self._weights / name), error.strerror or str(error), "a readable file")
            ) from error
        return tensor
