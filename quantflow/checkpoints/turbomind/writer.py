"""Writing a TurboMind workspace: native Llama tensors, plain or as AWQ gemm words, arrive one at a
time; those that are fused into one file are held until all of them are there."""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantflow.checkpoints.rounding import converted
from quantflow.checkpoints.tensor_file import check_announced, torch_dtype
from quantflow.checkpoints.turbomind.config import (
    CONFIG,
    KV_INT8,
    MOST_RANKS,
    WEIGHTS,
    dimension_problems,
    ini_values,
    layout_of,
)
from quantflow.checkpoints.turbomind.files import KV_PARTS, kv_file, kv_name
from quantflow.checkpoints.turbomind.layout import (
    Layout,
    Spec,
    Stored,
    encode,
    native_specs,
    stored_layer,
    stored_outer,
    stored_tensors,
)
from quantflow.errors import FormatError, Problem
from quantflow.models.config import DecoderConfig
from quantflow.paths import naming

if TYPE_CHECKING:
    from torch import Tensor

_PLAIN = ("F32", "F16", "BF16")


def workspace_problems(
    config: DecoderConfig, *, tp: int, int4: bool, group_size: int
) -> list[Problem]:
    """Everything that keeps a model from being written as a workspace, known from its config. [] if
    nothing does.

    group_size: of the int4 linears; not looked at for the others.
    """
    problems = []

    def wrong(where: str, actual: str, expected: str = "", hint: str = "") -> None:
        problems.append(Problem(f"TurboMind workspace: {where}", actual, expected, hint))

    # Parts that a workspace has no place for.
    if config.family != "llama":
        wrong("model", f"a decoder of the {config.family} kind", "a Llama-like one")
    if config.experts:
        wrong("model", "a mixture of experts", "one MLP a layer")
    if config.qk_norm:
        wrong("model", "norms on q and k, for which a workspace has no place")
    if config.mlp_bias:
        wrong("model", "biases in the MLP, for which a workspace has no place")
    if config.output_bias and not config.attention_bias:
        wrong("model", "a bias on o alone", "biases on q, k and v too, or none")
    if any(window is not None and window < config.context for window in config.sliding_windows):
        wrong(
            "model",
            "sliding windows",
            "full attention",
            "TurboMind v0.1 would attend to everything",
        )
    if config.activation != "silu":
        wrong("model", f"activation {config.activation}", "silu")
    # Numbers that config.ini cannot say.
    if config.dtype not in ("float16", "bfloat16"):
        wrong("dtype", config.dtype, "float16 or bfloat16", "Convert the model first")
    if config.rope.kind not in ("default", "dynamic", "qwen"):
        wrong(
            "rope scaling",
            config.rope.kind,
            "none or dynamic, the only kind that config.ini can say",
        )
    if config.logn_length not in (None, config.max_positions):
        wrong(
            "logn attention",
            f"from {config.logn_length} on",
            f"from max_position_embeddings = {config.max_positions} on",
        )
    if config.heads * config.head_dim != config.hidden:
        wrong(
            "head_dim",
            f"{config.heads} heads of {config.head_dim}",
            f"hidden_size = {config.hidden} in all",
        )
    # What the caller chose.
    if not 1 <= tp <= MOST_RANKS:
        wrong("tp", f"{tp}", f"1 to {MOST_RANKS}")
    if int4 and group_size < 1:
        wrong(
            "group_size", f"{group_size}", "a positive number: config.ini has one for all linears"
        )
    # Dimensions, which are worth a look only where all the rest is right.
    if not problems:
        layout = layout_of(config, tp, group_size if int4 else 0)
        problems += [
            Problem(f"TurboMind workspace: {p.where}", p.found, p.expected, p.hint)
            for p in dimension_problems(layout, 128)
        ]
    return problems


class WorkspaceWriter:
    """Writes the weights of a workspace, whose tensors arrive one at a time, in any order.

    specs: native name -> (safetensors dtype, shape) of all of them; the linears of every layer as
    `.weight` or, with `group_size`, as the AWQ gemm triple. tp: for how many ranks; the tensors
    that arrive are whole. kv: scales and zero points of an int8 KV cache under their native names,
    float32, one for all ranks (`[]`) or one each (`[tp]`). rounded: a plain tensor that the
    workspace's dtype does not hold exactly is rounded, and its relative L2 error noted in
    `rounding`, instead of refused.

    Raises FormatError with everything that prevents the workspace. `close` checks that every tensor
    came and writes config.ini, so that a workspace without one is an unfinished one.
    """

    def __init__(
        self,
        folder: Path,
        config: DecoderConfig,
        raw_config: Mapping[str, Any],
        specs: Mapping[str, Spec],
        *,
        tp: int = 1,
        model_name: str,
        kv: Mapping[str, Tensor] | None = None,
        group_size: int = 0,
        rounded: bool = False,
    ) -> None:
        int4 = any(name.endswith(".qweight") for name in specs)
        problems = workspace_problems(config, tp=tp, int4=int4, group_size=group_size)
        if not model_name or not model_name.isprintable() or model_name != model_name.strip():
            problems.append(
                Problem("TurboMind workspace: model_name", repr(model_name), "a printable name")
            )
        if problems:
            raise FormatError(problems)
        self.layout = layout_of(config, tp, group_size if int4 else 0)
        kv_rows, problems = _kv_rows(kv, config.layers, tp)
        problems += _spec_problems(specs, self.layout, config)
        if problems:
            raise FormatError(problems)
        self.folder = folder
        self.rounding: dict[str, float] = {}
        self._rounded, self._specs, self._missing = rounded, dict(specs), set(specs)
        self._ini = ini_values(
            config, raw_config, self.layout, model_name, KV_INT8 if kv_rows else 0
        )
        self._held: dict[str, Tensor] = {}
        self._weights = folder / WEIGHTS
        self._weights.mkdir(parents=True, exist_ok=True)
        self._write_kv(kv_rows)
        self._write_absent_biases()

    def _write_kv(self, rows: Sequence[Sequence[Sequence[float]]]) -> None:
        import torch

        for layer, ranks in enumerate(rows):
            for rank, values in enumerate(ranks):
                self._write_file(kv_file(layer, rank), torch.tensor(values, dtype=torch.float32))

    def _write_absent_biases(self) -> None:
        # attn_bias = 1 makes TurboMind read a bias for o as well. Of a model with biases on q, k
        # and v alone, which the first Qwen is and Qwen2 too, LMDeploy wrote zeros for o, and so
        # does this: without the files the engine would add what its memory happens to hold.
        import torch

        if not self.layout.bias:
            return
        zeros = torch.zeros(self.layout.hidden, dtype=torch_dtype(self.layout.dtype))
        for i in range(self.layout.layers):
            for stored in stored_layer(self.layout, i):
                if (
                    stored.part == "bias"
                    and stored.linear == "wo"
                    and stored.sources[0] not in self._specs
                ):
                    for name in stored.files:
                        self._write_file(name, zeros)

    def write(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor, which must have the dtype and shape that were announced; writes each file
        whose tensors are all there.

        Raises FormatError for a plain tensor whose values the workspace's dtype does not hold.
        """
        check_announced(name, tensor, self._specs[name], self._missing)
        self._missing.discard(name)
        tensor = tensor.detach().cpu()
        if not name.endswith((".qweight", ".qzeros", ".scales")):
            tensor = self._converted(name, tensor)
        stored = self._stored_of(name)
        self._held[name] = tensor
        if all(source in self._held for source in stored.sources):
            parts = [self._held.pop(source) for source in stored.sources]
            for file, part in zip(stored.files, encode(stored, self.layout, parts), strict=True):
                self._write_file(file, part)
                # a tied head is stored all the same
                if name == "model.embed_tokens.weight" and "lm_head.weight" not in self._specs:
                    self._write_file("output.weight", part)

    def _stored_of(self, name: str) -> Stored:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        candidates = (
            stored_layer(self.layout, int(layer[1])) if layer else stored_outer(self.layout)
        )
        return next(stored for stored in candidates if name in stored.sources)

    def _converted(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor` in the workspace's dtype; raises FormatError where that loses something and may
        not."""
        result, error = converted(
            name, tensor, torch_dtype(self.layout.dtype), rounded=self._rounded
        )
        if error:
            self.rounding[name] = error
        return result

    def _write_file(self, name: str, tensor: Tensor) -> None:
        import torch

        with naming(self._weights / name), open(self._weights / name, "wb") as file:
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Writes config.ini; raises ValueError if a tensor that was announced never came."""
        if self._missing:
            raise ValueError(
                f"{self.folder}: never written: {', '.join(sorted(self._missing)[:5])}"
            )
        parser = configparser.ConfigParser(interpolation=None)
        parser["llama"] = self._ini
        with (
            naming(self._weights / CONFIG),
            open(self._weights / CONFIG, "w", encoding="utf-8") as file,
        ):
            parser.write(file)
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> WorkspaceWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._held.clear()
        if kind is None:
            self.close()


def _spec_problems(
    specs: Mapping[str, Spec], layout: Layout, config: DecoderConfig
) -> list[Problem]:
    """Where the tensors that are announced differ from those that the config asks for."""
    expected: dict[str, Spec] = {}
    for stored in stored_tensors(layout):
        expected.update(native_specs(layout, stored))
    plain = [name for name in specs if name.endswith("_proj.weight")] if layout.group_size else []
    if plain:
        text = f"{plain[0]} is plain, others are int4" + (
            f"; so are {len(plain) - 1} more" if plain[1:] else ""
        )
        return [Problem("TurboMind workspace", text, "all linears of the layers of one kind")]
    problems = []
    absent = [
        name
        for name in expected
        if name not in specs
        and not (name == "lm_head.weight" and config.tied)
        and not (name.endswith(".o_proj.bias") and not config.output_bias)
    ]
    for kind, names in (
        ("missing", absent),
        ("unknown", [name for name in specs if name not in expected]),
    ):
        if names:
            text = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            problems.append(Problem("TurboMind workspace", f"{kind} tensors: {text}"))
    for name, (dtype, shape) in specs.items():
        if name not in expected:
            continue
        wanted, wanted_shape = expected[name]
        dtypes = (wanted,) if name.endswith((".qweight", ".qzeros", ".scales")) else _PLAIN
        if tuple(shape) != wanted_shape or dtype not in dtypes:
            actual, right = f"{dtype} {list(shape)}", f"{' or '.join(dtypes)} {list(wanted_shape)}"
            problems.append(Problem(name, actual, right))
    return problems


def _kv_rows(
    kv: Mapping[str, Tensor] | None, layers: int, tp: int
) -> tuple[list[list[list[float]]], list[Problem]]:
    """For each layer and rank the numbers of its file: scales, and zero points unless all of the
    model's are 0; and what is wrong."""
    import torch

    if not kv:
        return [], []
    names = {kv_name(i, part) for i in range(layers) for part in KV_PARTS}
    problems = [
        Problem(name, "no such KV parameter in a workspace") for name in kv if name not in names
    ]
    problems += [
        Problem(name, "missing", "a scale and a zero point for K and V of every layer")
        for name in sorted(names - set(kv))
    ]
    for name in sorted(names & set(kv)):
        tensor = kv[name]
        if tensor.dtype != torch.float32 or tuple(tensor.shape) not in ((), (tp,)):
            expected = f"torch.float32 [] or [{tp}]: one number for all heads of a rank"
            problems.append(Problem(name, f"{tensor.dtype} {list(tensor.shape)}", expected))
        elif not bool(tensor.isfinite().all()) or (
            name.endswith("_scale") and not bool((tensor > 0).all())
        ):
            problems.append(Problem(name, f"{tensor.tolist()}", "finite numbers, scales above 0"))
    if problems:
        return [], problems
    symmetric = all(not bool(kv[name].any()) for name in names if name.endswith("_zero_point"))
    parts = KV_PARTS[::2] if symmetric else KV_PARTS
    values = [
        [kv[kv_name(i, part)].cpu().expand(tp).tolist() for part in parts] for i in range(layers)
    ]
    return [[[part[rank] for part in layer] for rank in range(tp)] for layer in values], []
