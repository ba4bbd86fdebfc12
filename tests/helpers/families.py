"""A model type of the transformers library on its way from a tiny checkpoint to an artifact, and
what of that a table says (`docs/models.md`)."""

from __future__ import annotations

import contextlib
import logging
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
from tests.helpers.library import write_tiny
from tests.helpers.tiny import write_text
from tests.helpers.zoo import decoder_logits, random_tokens

LAYER_STAGES: list[Any] = ["calibrate", {"awq": {"grid": 2}}, "gptq", "kv_qparams"]
GROUP = 32


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
        report = _run(root, model, output)
    except UserError as error:
        return Family(
            model_type, name, "no", note=_line(error).replace(f"{model}/config.json: ", "")
        )
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


def _run(root: Path, model: Path, output: Path) -> dict[str, Any]:
    recipe = {
        "name": "walk",
        "model": str(model),
        "output": str(output),
        "calibration": {
            "data": str(write_text(root / "text.txt", 0, 64)),
            "samples": 4,
            "seqlen": 16,
        },
        "weights": {"bits": 4, "group_size": GROUP, "symmetric": True},
        "stages": [*LAYER_STAGES, {"pack": {"format": "compressed-tensors"}}],
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
    tokens = random_tokens(2, 12).clamp(min=3)  # a padding's embedding is zero in some classes
    expected = decoder_logits(weights, tokens)
    try:
        with _quiet(), torch.inference_mode():
            model = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
            logits = model.eval()(tokens).logits
    except Exception as error:
        return "no", f"transformers does not load the artifact: {_line(error)}"
    error = float((logits - expected).abs().max() / expected.abs().max())
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
    """Every tensor of the source's headers is quantised, copied or named as left out; every matrix
    of its layers is quantised or named with the reason."""
    source, written = header(model), header(output)
    packed = {n.removesuffix("_packed") for n in written if n.endswith(".weight_packed")}
    account = report["tensors"]
    assert {f"{name}.weight" for name in report["linears"]} == packed
    assert len(source) == account["source"]
    assert account["source"] == account["quantised"] + account["kept"] + len(account["left_out"])
    matrices = {n for n, shape in source.items() if len(shape) > 1 and _in_a_layer(n)}
    kept = {name for n in report["kept"] for name in (n, f"{n}.weight")}
    assert matrices - packed <= kept | set(account["left_out"]), sorted(matrices - packed - kept)[
        :4
    ]
    assert packed <= matrices


def _in_a_layer(name: str) -> bool:
    return any(part.isdecimal() for part in name.split("."))


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


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
