"""A recipe to begin with: for a model, a width, and the engine that is to load what comes out."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.errors import Problem, UserError
from quantflow.formats.engines import LLAMA_CPP, LMDEPLOY, SGLANG, TRANSFORMERS, VLLM, loads
from quantflow.formats.weight import LEAST_GROUP
from quantflow.pipeline.resolve import GROUPS, SEQLEN
from quantflow.quant.numbers.base import BITS
from quantflow.quant.scheme import PER_CHANNEL, Scheme
from quantflow.recipe import BUNDLED, BUNDLED_NEW
from quantflow.recipe.writer import flow, name_of
from quantflow.stages.evaluate import LENGTH

# of the bundled texts there is enough for so many windows, of 2048 and of 512 tokens
SAMPLES, WINDOWS = 32, 32


BY_ROW = (
    "a scale a row: no group that it reads divides all inputs. Loses more than groups do; it fits"
    " any model"
)


@dataclass(frozen=True)
class Way:
    """One way to an engine. groups: sizes in the order that they are tried. rows: whether a scale
    for a whole row is tried when they do not fit. why: of the choice, for who reads the recipe.
    Which widths and groups the engine loads of the format is in `engines.LOADS`."""

    format: str
    symmetric: bool
    why: str
    groups: tuple[int, ...] = GROUPS
    rows: bool = True


@dataclass(frozen=True)
class Target:
    """title: as the engine calls itself. engine: as `engines.LOADS` does. ways: the first that has
    the width and fits the model is taken.
    command: how it is started with an artifact `{}`."""

    title: str
    engine: str
    ways: tuple[Way, ...]
    command: str

    def schemes(self, bits: int) -> Iterator[tuple[Way, Scheme]]:
        """What is offered in so many bits, the best first."""
        offered = [(way, group) for way in self.ways for group in way.groups]
        for way, group in [
            *offered,
            *((replace(way, why=BY_ROW), PER_CHANNEL) for way in self.ways if way.rows),
        ]:
            scheme = Scheme(bits, group, way.symmetric)
            if loads(self.engine, way.format, scheme):
                yield way, scheme


TARGETS = {
    "vllm": Target(
        "vLLM",
        VLLM,
        (
            Way(
                "compressed-tensors",
                True,
                "symmetric, 4 or 8 bits, in groups of 128, 64 or 32: its Marlin kernels take those",
            ),
        ),
        "vllm serve {}",
    ),
    "lmdeploy": Target(
        "LMDeploy",
        LMDEPLOY,
        (
            Way(
                "awq",
                False,
                "TurboMind reads AWQ in groups of 128 alone, with zero points",
                rows=False,
            ),
            Way(
                "compressed-tensors",
                True,
                "128 does not divide all inputs; TurboMind's other groups are 32, of this format",
            ),
        ),
        "lmdeploy serve api_server {}",
    ),
    "sglang": Target(
        "SGLang",
        SGLANG,
        (
            Way("awq", False, "it reads AWQ with zero points", rows=False),
            Way("compressed-tensors", True, "8 bits are compressed-tensors', symmetric"),
        ),
        "python -m sglang.launch_server --model-path {}",
    ),
    "transformers": Target(
        "transformers",
        TRANSFORMERS,
        (
            Way(
                "compressed-tensors",
                True,
                "symmetric: experts have no zero points there",
                (*GROUPS, LEAST_GROUP),
            ),
        ),
        'AutoModelForCausalLM.from_pretrained("{}")',
    ),
    "llama.cpp": Target(
        "llama.cpp",
        LLAMA_CPP,
        (
            Way(
                "gguf",
                True,
                "Q4_0 and Q8_0 have a scale for every 32 weights, and no zero point",
                (32,),
                rows=False,
            ),
        ),
        "llama-server -m {}/model.gguf",
    ),
}


@dataclass(frozen=True)
class Starter:
    """name: of the recipe. text: of its file."""

    name: str
    text: str


def starter(
    checkpoint: Checkpoint,
    model: str,
    bits: int,
    engine_name: str,
    data: str | None = None,
    file: str | None = None,
) -> Starter:
    """The recipe. model: as it is to be named there. data: the calibration text, None for the
    bundled one. file: where the recipe goes; by default NAME.yaml. Raises UserError for what the
    engine does not load."""
    target, (way, scheme) = TARGETS[engine_name], offer(checkpoint, bits, engine_name)
    name = re.sub(r"[^A-Za-z0-9._-]", "", name_of(Path(model), f"_w{bits}_{engine_name}"))
    place = shlex.quote(file or f"{name}.yaml")
    # The sections of the recipe.
    most = checkpoint.config.max_positions
    weights = {
        "bits": bits,
        "group_size": scheme.group_size,
        "symmetric": way.symmetric,
        "ignore": ["lm_head"],
    }
    calibration = {"data": data or BUNDLED, "samples": SAMPLES, "seqlen": min(SEQLEN, most)}
    evaluate = {"data": BUNDLED_NEW, "windows": WINDOWS, "length": min(LENGTH, most)}
    advice = (
        f"{BUNDLED} comes with QuantFlow: English documentation. Text like what the model will be"
        " asked is better: data: my.txt"
    )
    if data:
        advice = "Of a file of text, or a data set such as c4. More samples, better statistics."
    # The recipe, with the words that explain it.
    lines = [
        (
            f"# {checkpoint.path.name} ({checkpoint.architecture.name}, {checkpoint.config.layers}"
            f" layers) in {bits} bits for {target.title}."
        ),
        f"#   quantflow plan {place}    # what it would take, and what stands in the way",
        f"#   quantflow run {place}     # may be stopped and run again: it goes on where it was",
        f"#   {target.command.format(f'artifacts/{name}')}",
        f"name: {flow(name)}",
        f"model: {flow(model)}",
        f"# {advice}",
        f"calibration: {flow(calibration)}",
        f"# For {target.title}: {way.why}.",
        f"weights: {flow(weights)}",
        "stages:",
        (
            "  # Rounding with error feedback. rtn in its place needs no calibration, takes"
            " seconds, and loses more."
        ),
        "  - gptq: {act_order: static}",
        f"  - pack: {flow({'format': way.format})}",
        (
            "  # On text that calibration has not seen. gates: {kl_mean: 0.1} would fail a run that"
            " loses more than that."
        ),
        f"  - evaluate: {flow(evaluate)}",
    ]
    return Starter(name, "".join(f"{_one_line(line)}\n" for line in lines))


def offer(checkpoint: Checkpoint, bits: int, engine_name: str) -> tuple[Way, Scheme]:
    """What an engine loads in that many bits, of what fits the model. Raises UserError for
    nothing."""
    target = TARGETS[engine_name]
    offered = list(target.schemes(bits))
    if not offered:
        known = [b for b in BITS if any(target.schemes(b))]
        others = [name for name, other in TARGETS.items() if any(other.schemes(bits))]
        hint = f"{bits} bits are for {', '.join(others)}" if others else ""
        raise UserError(
            Problem(
                "--bits",
                f"{bits} with --for {engine_name}",
                f"{' or '.join(map(str, known))}: what it loads",
                hint,
            )
        )
    return _fitting(checkpoint, offered, target)


def _one_line(text: str) -> str:
    """A comment stays one, whatever a model's folder is called."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _fitting(
    checkpoint: Checkpoint, offered: list[tuple[Way, Scheme]], target: Target
) -> tuple[Way, Scheme]:
    """The first that is offered in groups that divide the inputs of every linear. Raises UserError
    for none."""
    inputs = {
        name: spec.shape[1]
        for index in range(checkpoint.config.layers)
        for name, spec in checkpoint.linears(index).items()
    }
    shared = math.gcd(*inputs.values())
    choice = next(
        ((way, scheme) for way, scheme in offered if shared % scheme.group_size == 0), None
    )
    if choice is None:
        bits, sizes = offered[0][1].bits, sorted({scheme.group_size for _, scheme in offered})
        odd = min(inputs, key=lambda name: (math.gcd(inputs[name], sizes[0]), name))
        others = [
            name
            for name, other in TARGETS.items()
            if any(shared % scheme.group_size == 0 for _, scheme in other.schemes(bits))
        ]
        expected, hint = (
            f"inputs that groups of {' or '.join(map(str, sizes))} divide",
            f"They fit {', '.join(others)}" if others else "",
        )
        raise UserError(
            Problem("--for", f"{target.title} with {odd} of {inputs[odd]} inputs", expected, hint)
        )
    return choice
