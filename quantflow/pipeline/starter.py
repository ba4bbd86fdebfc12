"""A recipe to begin with: for a model, a width, and the engine that is to load what comes out."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from quantflow.errors import Problem, UserError
from quantflow.models.architecture import linear_shapes
from quantflow.models.checkpoint import Checkpoint
from quantflow.pipeline.plan import LENGTH, SEQLEN
from quantflow.recipe.writer import flow, name_of

SAMPLES, WINDOWS = 32, 32  # of the bundled texts there is enough for so many windows, of 2048 and of 512 tokens


@dataclass(frozen=True)
class Layout:
    """What an engine loads of a width. bits: of its kernels. groups: input channels that share a scale, in the order that they are tried.
    why: of the choice, for who reads the recipe."""

    format: str
    bits: tuple[int, ...]
    groups: tuple[int, ...]
    symmetric: bool
    why: str


@dataclass(frozen=True)
class Engine:
    """title: as it calls itself. layouts: the first that has the width is taken. command: how it is started with an artifact `{}`."""

    title: str
    layouts: tuple[Layout, ...]
    command: str


_KERNELS, _BITS = (128, 64, 32), (2, 3, 4, 5, 6, 7, 8)
ENGINES = {
    "vllm": Engine(
        "vLLM",
        (Layout("compressed-tensors", _BITS, _KERNELS, True, "symmetric, in groups of 128, 64 or 32, is what its fast kernels take"),),
        "vllm serve {}",
    ),
    "lmdeploy": Engine(
        "LMDeploy",
        (
            Layout("awq", (4,), (128,), False, "TurboMind reads AWQ in groups of 128 alone, with zero points"),
            Layout(
                "compressed-tensors", (4,), (32,), True, "128 does not divide all inputs; TurboMind's other groups are 32, of this format"
            ),
        ),
        "lmdeploy serve api_server {}",
    ),
    "sglang": Engine(
        "SGLang",
        (
            Layout("awq", (4,), _KERNELS, False, "it reads AWQ with zero points"),
            Layout("compressed-tensors", (8,), _KERNELS, True, "8 bits are compressed-tensors', symmetric"),
        ),
        "python -m sglang.launch_server --model-path {}",
    ),
    "transformers": Engine(
        "transformers",
        (Layout("compressed-tensors", _BITS, (*_KERNELS, 16, 8), True, "symmetric: experts have no zero points there"),),
        'AutoModelForCausalLM.from_pretrained("{}")',
    ),
    "llama.cpp": Engine(
        "llama.cpp",
        (Layout("gguf", (4, 8), (32,), True, "Q4_0 and Q8_0 have a scale for every 32 weights, and no zero point"),),
        "llama-server -m {}/model.gguf",
    ),
}


@dataclass(frozen=True)
class Starter:
    """name: of the recipe. text: of its file."""

    name: str
    text: str


def starter(checkpoint: Checkpoint, model: str, bits: int, engine_name: str, data: str | None = None, file: str | None = None) -> Starter:
    """The recipe. model: as it is to be named there. data: the calibration text, None for the bundled one. file: where the recipe goes;
    by default NAME.yaml. Raises UserError for what the engine does not load."""
    engine = ENGINES[engine_name]
    layouts = [layout for layout in engine.layouts if bits in layout.bits]
    if not layouts:
        known = sorted({b for layout in engine.layouts for b in layout.bits})
        others = [name for name, other in ENGINES.items() if any(bits in layout.bits for layout in other.layouts)]
        hint = f"{bits} bits are for {', '.join(others)}" if others else ""
        raise UserError(Problem("--bits", f"{bits} with --for {engine_name}", f"{' or '.join(map(str, known))}: what it loads", hint))
    layout, group = _fitting(checkpoint, layouts, engine)
    name = re.sub(r"[^A-Za-z0-9._-]", "", name_of(Path(model), f"_w{bits}_{engine_name}"))
    place = shlex.quote(file or f"{name}.yaml")
    most = checkpoint.config.max_positions
    weights = {"bits": bits, "group_size": group, "symmetric": layout.symmetric, "ignore": ["lm_head"]}
    calibration = {"data": data or "demo", "samples": SAMPLES, "seqlen": min(SEQLEN, most)}
    evaluate = {"data": "demo-new", "windows": WINDOWS, "length": min(LENGTH, most)}
    advice = "demo comes with QuantFlow: English documentation. Text like what the model will be asked is better: data: my.txt"
    if data:
        advice = "Of a file of text, or a data set such as c4. More samples, better statistics."
    lines = [
        f"# {checkpoint.path.name} ({checkpoint.architecture.name}, {checkpoint.config.layers} layers) in {bits} bits for {engine.title}.",
        f"#   quantflow plan {place}    # what it would take, and what stands in the way",
        f"#   quantflow run {place}     # may be stopped and run again: it goes on where it was",
        f"#   {engine.command.format(f'artifacts/{name}')}",
        f"name: {flow(name)}",
        f"model: {flow(model)}",
        f"# {advice}",
        f"calibration: {flow(calibration)}",
        f"# For {engine.title}: {layout.why}.",
        f"weights: {flow(weights)}",
        "stages:",
        "  # Rounding with error feedback. rtn in its place needs no calibration, takes seconds, and loses more.",
        "  - gptq: {act_order: static}",
        f"  - pack: {flow({'format': layout.format})}",
        "  # On text that calibration has not seen. gates: {kl_mean: 0.1} would fail a run that loses more than that.",
        f"  - evaluate: {flow(evaluate)}",
    ]
    return Starter(name, "".join(f"{_one_line(line)}\n" for line in lines))


def _one_line(text: str) -> str:
    """A comment stays one, whatever a model's folder is called."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _fitting(checkpoint: Checkpoint, layouts: list[Layout], engine: Engine) -> tuple[Layout, int]:
    """The first layout with a group size that divides the inputs of every linear, and the first such. Raises UserError for none."""
    inputs = {
        name: shape[1]
        for index in range(checkpoint.config.layers)
        for name, shape in linear_shapes(checkpoint.architecture, checkpoint.config, index).items()
    }
    shared = math.gcd(*inputs.values())
    found = next(((layout, group) for layout in layouts for group in layout.groups if shared % group == 0), None)
    if found is None:
        sizes = sorted({group for layout in layouts for group in layout.groups})
        odd = min(inputs, key=lambda name: (math.gcd(inputs[name], sizes[0]), name))
        others = ", ".join(name for name, other in ENGINES.items() if any(shared % g == 0 for have in other.layouts for g in have.groups))
        expected = f"inputs that groups of {' or '.join(map(str, sizes))} divide"
        raise UserError(
            Problem("--for", f"{engine.title} with {odd} of {inputs[odd]} inputs", expected, f"They fit {others}" if others else "")
        )
    return found
