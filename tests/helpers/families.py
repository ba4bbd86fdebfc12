"""A model type of the transformers library on its way from a tiny checkpoint to an artifact, and
what of that a table says (`docs/models.md`)."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import quantflow
from quantflow.decoder.decoder import open_decoder
from quantflow.engine.families import engine_problem
from quantflow.errors import UserError
from quantflow.formats.reader import Weights
from tests.helpers.library import auto_class, write_tiny
from tests.helpers.tiny import write_text
from tests.helpers.zoo import decoder_logits, random_tokens

LAYER_STAGES: list[Any] = ["calibrate", {"awq": {"grid": 2}}, "gptq", "kv_qparams"]
GROUP, PADDING = 32, 2


@dataclass(frozen=True)
class Family:
    """A row of the table.

    pipeline: `table`, `hosted`, or `no` with the reason in `note`. engine: whether ours runs it.
    loads: whether transformers loads the artifact and computes what we say it does. kv: of how many
    layers K and V have parameters. folds: of how many groups of linears AWQ scaled the input.
    """

    model_type: str
    name: str
    pipeline: str
    engine: str = ""
    loads: str = ""
    kv: str = ""
    folds: str = ""
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.pipeline != "no"

    @property
    def cells(self) -> tuple[str, ...]:
        return (
            f"`{self.model_type}`",
            self.name,
            self.pipeline,
            self.engine,
            self.loads,
            self.kv,
            self.folds,
            self.note,
        )


def walked(model_type: str, root: Path) -> Family:
    """Takes a tiny checkpoint through every layer stage, and looks at what was written.

    Asserts that nothing was lost on the way; what the product refuses is a row as well.
    """
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    model, output = root / "model", root / "artifact"
    try:
        with _quiet():
            write_tiny(model, model_type)
    except Exception as error:
        return Family(model_type, name, "no", note=f"no tiny checkpoint: {_line(error)}")
    try:
        report = _run(root)
    except UserError as error:
        note = str(error)
        for place in (f"{model}/config.json: ", f"{model}: ", f"{model} "):
            note = note.replace(place, "")
        return Family(model_type, name, "no", note=_line(note))
    check_account(model, output, report)
    weights = Weights(output)
    layers = report["model"]["layers"]
    folds = list(_folds(Weights(model)))
    kv = len(report["kv"]["key"]["low"]) if report["kv"] else 0
    hosted = weights.checkpoint.architecture.library is not None
    loads, note = _loaded(weights, output)
    return Family(
        model_type,
        report["model"]["architecture"] if hosted else name,
        "hosted" if hosted else "table",
        "no" if engine_problem(weights.checkpoint) else "yes",
        loads,
        f"{kv} of {layers} layers",
        f"{sum(folds)} of {len(folds)}",
        note,
    )


def _run(root: Path) -> dict[str, Any]:
    """The report of a run of all stages; where nothing caches K and V, of all but that."""
    try:
        return _report(root, LAYER_STAGES)
    except UserError as error:
        if "caches K and V" not in str(error):
            raise
        return _report(root, LAYER_STAGES[:-1])


def _report(root: Path, stages: list[Any]) -> dict[str, Any]:
    text = write_text(root / "text.txt", 0, 64)
    recipe = {
        "name": "walk",
        "model": str(root / "model"),
        "output": str(root / "artifact"),
        "calibration": {"data": str(text), "samples": 4, "seqlen": 16},
        "weights": {"bits": 4, "group_size": GROUP, "symmetric": True},
        "stages": [*stages, {"pack": {"format": "compressed-tensors"}}],
    }
    return quantflow.quantize(recipe, device="cpu").report


def _folds(weights: Weights) -> Iterator[bool]:
    """Of each group of linears that read one tensor: whether a scale of it can be folded away."""
    decoder = open_decoder(weights.checkpoint, 8, "cpu")
    for i in range(weights.checkpoint.config.layers):
        block = decoder.block(i, weights.layer(i), torch.float32)
        yield from (segment.fold is not None for segment in block.segments)


def _loaded(weights: Weights, output: Path) -> tuple[str, str]:
    """Whether transformers computes of the artifact what we do of its numbers; else why not."""
    tokens = random_tokens(2, 12).clamp(min=PADDING + 1)
    expected = decoder_logits(weights, tokens)
    try:
        with _quiet(), torch.inference_mode():
            auto = auto_class(weights.checkpoint.raw_config["model_type"])
            model = auto.from_pretrained(output, dtype=torch.float32)
            logits = model.eval()(tokens).logits
    except Exception as error:
        return "no", f"transformers does not load the artifact: {_line(error)}"
    # Some classes make the embedding of padding zero whenever they load one, and the head is that.
    error = float((logits - expected)[..., PADDING + 1 :].abs().max() / expected.abs().max())
    return ("yes", "") if error < 1e-4 else ("no", f"logits in transformers differ by {error:.0e}")


def header(folder: Path) -> dict[str, list[int]]:
    """Name -> shape of every tensor in a checkpoint's files."""
    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name.startswith("model"):
            with safe_open(path, "pt") as file:
                shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return shapes


def check_account(model: Path, output: Path, report: dict[str, Any]) -> None:
    """By the headers of both: every tensor of the source is quantised, or written as it was, or
    named as left out; and what of its layers is a matrix and stays one is named with the reason."""
    source, written = header(model), header(output)
    account = report["tensors"]
    copied, left_out = account["copied"], account["left_out"]
    packed = {n.removesuffix("_packed") for n in written if n.endswith(".weight_packed")}
    assert {f"{name}.weight" for name in report["linears"]} == packed
    # Experts that lie in one tensor of the source are each a linear of the artifact.
    mixtures = tuple({_mixture(name) for name in packed - source.keys()})
    fused = {n for n, shape in source.items() if len(shape) == 3 and n.startswith(mixtures)}
    quantised = packed & source.keys() | fused
    numbers = sum(8 * math.prod(written[f"{name}_packed"]) for name in packed)  # of 4 bits
    assert numbers == sum(math.prod(source[name]) for name in quantised)
    assert len(quantised) == account["quantised"] and len(source) == account["source"]
    assert len(source) == len(quantised) + account["kept"] + len(copied) + len(left_out)
    others = source.keys() - quantised - left_out.keys()
    changed = sorted(name for name in others if written.get(name) != source[name])
    assert not changed, f"neither quantised nor as they were: {changed[:4]}"
    named = {part for name in report["kept"] for part in (name, f"{name}.weight")} | copied.keys()
    layers = {_layers_of(name) for name in packed}
    matrices = {n for n in others if len(source[n]) > 1 and _layers_of(n) in layers}
    one_by_one = tuple(_mixture(name) for name in named if ".experts." in name)
    fused = {n for n in matrices if len(source[n]) == 3 or n.endswith("_bias")}
    unnamed = sorted(n for n in matrices - named if n not in fused or not n.startswith(one_by_one))
    assert not unnamed, f"no reason for {unnamed[:4]}"


def _mixture(name: str) -> str:
    """Where the experts are of which a tensor is one's."""
    return name.partition(".experts.")[0]


def _layers_of(name: str) -> str:
    """What stands before the number of a layer; of a tensor in none, all."""
    parts = name.split(".")
    number = next((n for n, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[:number])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' advice and progress bars."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def _line(error: Exception | str) -> str:
    return " ".join(str(error).split())[:240].strip()
