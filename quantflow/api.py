"""What notebooks and programs call, and the command line's verbs too: plan, quantise, export,
measure. What is wrong is raised as `quantflow.UserError`, with every problem, as the command line
shows it; nothing is printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantflow import bundled
from quantflow.errors import Problem, UserError

if TYPE_CHECKING:
    from quantflow.evaluate.divergence import Divergence
    from quantflow.pipeline.artifact import Artifact
    from quantflow.pipeline.export import Exported
    from quantflow.pipeline.plan import Plan
    from quantflow.pipeline.progress import Progress

    Place = str | PathLike[str]
    RecipeLike = Place | Mapping[str, Any]


def plan(
    recipe: RecipeLike,
    *,
    model: Place | None = None,
    output: Place | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    config_only: bool = False,
) -> Plan:
    """A recipe resolved against a checkpoint, before any weight is read.

    Args:
        recipe: A YAML file, the name of a bundled recipe such as `"w4"`, or a dictionary with the
            keys that a file would have. Relative paths in a dictionary are taken from the current
            directory.
        model: A model directory or hub id, in place of the recipe's.
        output: Where the artifact goes, in place of the recipe's; by default `artifacts/NAME`, or
            `artifacts/MODEL_NAME` where `model` is given.
        overrides: Changes of single values, such as `"stages.gptq.damp=0.05"`.
        device: `"cpu"`, `"cuda"`, or `"auto"`: a GPU where there is one.
        config_only: Plan from `config.json` alone, where no weight files are there.

    Returns:
        The plan: every linear with its scheme, and notes and warnings. `quantize` runs it.

    Raises:
        UserError: With everything that is wrong with the recipe, the model, the texts and the
            output.
    """
    from quantflow.pipeline.plan import make_plan
    from quantflow.stages.registry import load_recipe

    loaded = load_recipe(
        recipe if isinstance(recipe, Mapping) else bundled.find(Path(recipe)),
        overrides,
        model=None if model is None else str(model),
        output=None if output is None else str(output),
    )
    return make_plan(loaded, device=device, config_only=config_only)


def quantize(
    recipe: RecipeLike | Plan,
    *,
    model: Place | None = None,
    output: Place | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    fresh: bool = False,
    enforce_gates: bool = True,
    progress: Progress | None = None,
) -> Artifact:
    """Runs a recipe, or finds its artifact finished.

    What is done is kept layer by layer: the same call after an interruption goes on where it
    stopped, and writes the same bytes.

    Args:
        recipe: What `plan` takes, or a plan, to which nothing else of it can be added.
        model: As in `plan`.
        output: As in `plan`.
        overrides: As in `plan`.
        device: As in `plan`.
        fresh: Forget this recipe's stored layers and begin again.
        enforce_gates: Whether a quality gate that is missed raises; else the artifact's `failures`
            say so. It is kept in either case.
        progress: Hears of phases and steps; see `Progress`. By default nobody does.

    Returns:
        The artifact: where it is, its quality, its report.

    Raises:
        UserError: As `plan` does, and for texts that cannot be used.
        GateError: For gates that were missed, with `enforce_gates`.
        ResourceError: Where the machine could not do it.
    """
    from quantflow.models.config import ConfigProblem
    from quantflow.pipeline.plan import Plan
    from quantflow.pipeline.progress import Silent
    from quantflow.pipeline.run import run

    if isinstance(recipe, Plan):
        given = {
            "model": model,
            "output": output,
            "overrides": overrides or None,
            "device": None if device == "auto" else device,
        }
        if wrong := [name for name, value in given.items() if value is not None]:
            raise UserError(
                [Problem(name, "given beside a plan", "it in the call of plan") for name in wrong]
            )
        resolved = recipe
    else:
        resolved = plan(recipe, model=model, output=output, overrides=overrides, device=device)
    try:
        artifact = run(resolved, progress or Silent(), fresh=fresh)
    except ConfigProblem as error:  # what a class of transformers does is seen only as it runs
        raise UserError([Problem(f"{resolved.model}/config.json", str(error))]) from error
    if enforce_gates:
        artifact.check_gates()
    return artifact


def export(
    source: Place,
    format: str,
    output: Place,
    *,
    tp: int = 1,
    max_shard_size: int | str = "5GB",
    requantize: bool = False,
    dtype: str | None = None,
    kv_scales: str | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Writes a checkpoint in another format: exactly, or not at all.

    Args:
        source: An artifact, anybody's checkpoint in a format that is read, a `.gguf` file, or a
            hub id.
        format: A format's name, as in a recipe's `pack`; `quantflow formats` lists them.
        output: A new directory, or an empty one.
        tp: Tensor-parallel ranks to cut beside the whole.
        max_shard_size: Bytes a file, at most: a number, or a text such as `"512MiB"`.
        requantize: Round what the format cannot hold, and report the error.
        dtype: With `huggingface`: `"float32"`, `"float16"` or `"bfloat16"`.
        kv_scales: `"fp8"` writes scales of such a KV cache into a compressed-tensors checkpoint.
        progress: Hears of phases and steps; see `Progress`.

    Returns:
        What was written, what was left out, and the relative errors of what was rounded.

    Raises:
        FormatError: With every reason why the format cannot hold it exactly. A UserError, as the
            rest: ModelError for a source that is wrong, OutputError for a place that holds
            something.
    """
    from quantflow.pipeline import export as exporting
    from quantflow.recipe.values import parse_bytes

    try:
        decimal = isinstance(max_shard_size, str) and max_shard_size.isdecimal()
        most = parse_bytes(int(max_shard_size) if decimal else max_shard_size)
    except ValueError as error:
        raise UserError(Problem("--max-shard-size", repr(max_shard_size), str(error))) from error
    options = exporting.Options(
        tp=tp, max_shard_bytes=most, requantize=requantize, dtype=dtype, kv_scales=kv_scales
    )
    return exporting.export(str(source), format, Path(output), options, progress)


def measure(
    model: Place,
    reference: Place,
    data: Place,
    *,
    field: str | None = None,
    windows: int = 64,
    length: int = 512,
    skip: int = 0,
    engine: bool = False,
    kv: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> Divergence:
    """Compares a model with its full-precision original on text.

    Args:
        model: An artifact or a checkpoint, quantised or not.
        reference: The full-precision model, which is computed in float32.
        data: A file: text with `<|endoftext|>` between documents, JSON lines, JSON, CSV, Parquet.
        field: The field or column of `data` that holds the text, if not a usual one.
        windows: How many windows to take of the text.
        length: Tokens a window.
        skip: Documents left out at the start.
        engine: Measure the engine's own kernels and KV cache, not the weights in float32.
        kv: With `engine`, its KV cache: `"auto"`, `"int8"`, `"dynamic"` or `"full"`.
        device: `"cpu"`, `"cuda"` or `"auto"`.
        progress: Hears of phases and steps, and of what is odd about models and text.

    Returns:
        Perplexity of both models, KL divergence in nats a token (mean and 99th percentile), and
        the share of tokens whose most likely successor is the same.

    Raises:
        UserError: For models that cannot be compared, and text that cannot be read.
    """
    from quantflow.pipeline.comparison import compare_on_text
    from quantflow.pipeline.progress import Silent

    return compare_on_text(
        str(model),
        str(reference),
        str(data),
        field=field,
        windows=windows,
        length=length,
        skip=skip,
        engine=engine,
        kv=kv,
        device=device,
        progress=progress or Silent(),
    )
