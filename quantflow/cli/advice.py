"""`quantflow plan --fit`: what of a model fits a device, with the sum put in numbers."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from quantflow.cli.console import console, errors
from quantflow.cli.recipes import find
from quantflow.errors import Problem, UserError

if TYPE_CHECKING:
    from quantflow.checkpoints.checkpoint import Checkpoint
    from quantflow.pipeline.advice import Advice, Fitted, Measured
    from quantflow.pipeline.memory import Model, Need, Term
    from quantflow.recipe import Recipe

NOTHING_FITS = 2


def show_advice(
    recipe: Path | None,
    model: str | None,
    changes: list[str],
    fit: str,
    context: int | None,
    batch: int | None,
    device: str,
    tp: int | None,
    sensitivity: Path | None,
    *,
    config_only: bool,
    as_json: bool,
) -> None:
    """Prints the proposal; ends with exit code 2 where nothing fits. Raises UserError."""
    from quantflow.checkpoints.checkpoint import Checkpoint, resolve_model
    from quantflow.pipeline.advice import advise, measured
    from quantflow.pipeline.memory import RANKS, Model, Question
    from quantflow.recipe.values import parse_bytes
    from quantflow.stages.registry import load_recipe

    # The options, with everything that is wrong with them.
    problems, most = [], 0
    try:
        most = parse_bytes(int(fit) if fit.isdecimal() else fit)
    except ValueError as error:
        problems.append(Problem("--fit", repr(fit), str(error)))
    loaded: Recipe | None = None
    if recipe is not None:
        try:
            loaded = load_recipe(find(recipe), changes, model=model)
        except UserError as error:
            problems += error.problems
    elif changes:
        problems.append(Problem("--set", "no recipe to change", "a RECIPE beside it"))
    name = model or (loaded.model if loaded else None)
    if name is None and (loaded or recipe is None):
        problems.append(
            Problem(
                "--model",
                "none given",
                "a model directory or hub id; with --config-only, its config.json is enough",
            )
        )
    if problems or name is None:
        raise UserError(problems)
    # The question.
    checkpoint = Checkpoint(resolve_model(name), config_only=config_only)
    question = Question(
        most,
        context or min(4096, checkpoint.config.context),
        batch or 1,
        device,
        (tp,) if tp else RANKS,
        loaded.weights.symmetric if loaded else None,
        tuple(loaded.weights.ignore) if loaded else (),
    )
    if wrong := checkpoint.problems():
        raise UserError(wrong)
    # The answer.
    advice, (quality, unusable) = advise(checkpoint, question), measured(checkpoint, sensitivity)
    if as_json:
        print(json.dumps(_record(advice, quality, unusable), indent=2))
    else:
        _show(
            checkpoint, name, loaded, recipe, advice, quality, unusable, Model(checkpoint, question)
        )
    if advice.proposal is None:
        sys.exit(NOTHING_FITS)


def _record(advice: Advice, quality: Measured | None, unusable: list[str]) -> dict[str, Any]:
    """sensitivity: the file that `kl_mean` is from, and whether it is known to be of these weights;
    unusable: files that are damaged."""
    record = advice.as_dict()
    record["sensitivity"] = (
        {"file": str(quality.path), "same_weights": quality.same_weights} if quality else None
    )
    record["unusable"] = unusable
    scheme = advice.proposal.candidate.scheme if advice.proposal else None
    if record["proposal"]:
        record["proposal"]["kl_mean"] = (
            0.0 if scheme is None else quality.of(scheme) if quality else None
        )
    return record


def _sizes(fit: int) -> Callable[[int], str]:
    """Writes bytes in one unit for all that is held against `fit`, so that a column of them adds
    up."""
    unit, name = (2**30, "GiB") if fit >= 2**30 else (2**20, "MiB")
    return lambda count: f"{count / unit:.2f} {name}"


def _show(
    checkpoint: Checkpoint,
    name: str,
    recipe: Recipe | None,
    path: Path | None,
    advice: Advice,
    quality: Measured | None,
    unusable: list[str],
    model: Model,
) -> None:
    question, size = advice.question, _sizes(advice.question.fit)
    sequences = (
        f"{question.batch} text{'s' if question.batch > 1 else ''} of {question.context} tokens"
    )
    title = f"{name} ({checkpoint.architecture.name}) for {sequences} in {size(question.fit)}"
    console.print(title, style="bold")
    if advice.proposal is None:
        _show_nothing(advice)
        return
    proposal = advice.proposal
    c = proposal.candidate
    devices = "on one device" if c.tp == 1 else f"on each of {c.tp} devices"
    console.print(f"Proposed: {c}, {devices}.", style="bold green")
    console.print(_sum(proposal.need, question.fit))
    limit = checkpoint.config.context
    own = ", the model's own limit" if proposal.longest_context == limit else ""
    longer = f"{question.batch} × {proposal.longest_context}{own}"
    console.print(f"At most: {proposal.largest_batch} × {question.context} tokens, or {longer}.")
    if better := advice.better:
        console.print(
            f"The next better, {better.candidate}, lacks {size(better.need.total - question.fit)}."
        )
    for reason in unusable:
        console.print(f"Not usable as measurements: {reason}.", style="yellow")
    for line in _quality(shlex.quote(name), question.fit, proposal, quality):
        console.print(line)
    if saved := model.window_saves(c):
        console.print(
            f"Sliding windows: an engine that drops what they leave behind would need {size(saved)}"
            " less."
        )
    if len(advice.by_ranks) > 1:
        console.print(_by_ranks(advice))
    for line in _left_out(advice):
        console.print(line, style="dim")
    _show_next(checkpoint, name, recipe, path, advice, proposal)


def _show_nothing(advice: Advice) -> None:
    least, question, size = advice.least, advice.question, _sizes(advice.question.fit)
    where = "" if least.candidate.tp == 1 else f" on each of {least.candidate.tp} devices"
    errors.print(
        f"Nothing fits. The least is {least.candidate}: {size(least.need.total)}{where},"
        f" {size(least.need.total - question.fit)} too much (weights {size(least.need.weights)}, KV"
        f" {size(least.need.kv)}, activations {size(least.need.activations)}, reserve"
        f" {size(least.need.reserve)}). Lower --context or --batch.",
        style="bold red",
    )


def _sum(need: Need, fit: int) -> Table:
    """The four terms, what each is made of, and their sum."""
    size = _sizes(fit)
    table = Table("", "GiB", "", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_header=False)
    table.columns[1].justify = "right"
    for term in need.terms:
        table.add_row(term.name, size(term.bytes), _made(term, size))
    table.add_row("together", size(need.total), f"of {size(fit)}; {size(fit - need.total)} left")
    return table


def _made(term: Term, size: Callable[[int], str]) -> str:
    if term.largest:
        return "the largest of: " + ", ".join(
            f"{part.name} {size(part.bytes)}" for part in term.parts
        )
    return (
        " + ".join(part.made or f"{size(part.bytes)} of {part.name}" for part in term.parts)
        or term.made
    )


def _quality(name: str, fit: int, proposal: Fitted, quality: Measured | None) -> list[str]:
    c, lines = proposal.candidate, []
    source = (
        ""
        if quality is None
        else (
            f"{quality.text}{'' if quality.same_weights else ', of a model with the same config'};"
            f" {quality.path}"
        )
    )
    if c.scheme is None:
        lines.append("Weights: the model's own, nothing is lost.")
    elif quality is None:
        lines.append(
            f"What {c.scheme} costs: not measured. `quantflow sensitivity {name} --data FILE` does"
            " that."
        )
    elif (kl := quality.of(c.scheme)) is not None:
        lines.append(
            f"What {c.scheme} costs: KL {kl:.4g} nats a token by rounding to nearest ({source})."
        )
    else:
        had = ", ".join(f"{bits} bits {kl:.4g}" for bits, kl in quality.kl_mean.items())
        grid = f"g{quality.group_size} {'symmetric' if quality.symmetric else 'asymmetric'}"
        lines.append(
            f"What {c.scheme} costs: not measured. In {grid}, rounding to nearest: {had}"
            f" ({source})."
        )
    if c.int8_kv:
        lines.append(
            f"What int8 KV costs: not measured. `quantflow eval … --reference {name} --data FILE"
            " --engine --kv int8` does that."
        )
    if c.scheme and c.tp == 1:
        room = fit - proposal.need.total + proposal.need.weights
        most = f"{room // 2**20}MiB" if room >= 2**30 else f"{room // 2**10}KiB"
        command = f"quantflow sensitivity {name} --data FILE --budget {most}"
        lines.append(f"All weights may take {most}: `{command}` spends them where it counts.")
    return lines


def _by_ranks(advice: Advice) -> Table:
    """A row for each number of devices that something fits."""
    size = _sizes(advice.question.fit)
    table = Table(
        "devices",
        "best that fits",
        "on each",
        "batch at most",
        "context at most",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for tp, fitted in advice.by_ranks.items():
        row = (
            str(fitted.candidate),
            size(fitted.need.total),
            str(fitted.largest_batch),
            str(fitted.longest_context),
        )
        table.add_row(str(tp), *row)
    return table


def _left_out(advice: Advice) -> list[str]:
    """What has no row, counted: numbers of devices that nothing fits, with the least that would be
    needed there; those that the model cannot be cut for; and groups that a rank cannot have."""
    size, lines = _sizes(advice.question.fit), []
    if short := [tp for tp in advice.least_by_ranks if tp not in advice.by_ranks]:
        least = " and ".join(size(advice.least_by_ranks[tp].need.total) for tp in short)
        lines.append(f"{_devices(short)}, where nothing fits: the least is {least} on each.")
    if uncut := [tp for tp in advice.impossible if tp not in advice.least_by_ranks]:
        lines.append(
            f"{_devices(uncut)}, for which the model cannot be cut"
            f" ({advice.impossible[uncut[0]][0]})."
        )
    groups = {
        tp: sum(why.startswith("groups of") for why in reasons)
        for tp, reasons in advice.impossible.items()
    }
    if any(groups.values()):
        where = _devices([tp for tp, count in groups.items() if count])
        count = sum(groups.values())
        lines.append(
            f"{count} group size{'s' if count > 1 else ''} on {where}, which the inputs of a rank"
            " are no multiples of."
        )
    return [
        *(f"Left out: {line}" for line in lines),
        *(["Every reason is in --json."] if advice.impossible else []),
    ]


def _devices(counts: list[int]) -> str:
    listed = " and ".join(filter(None, (", ".join(map(str, counts[:-1])), str(counts[-1]))))
    return f"{listed} device{'s' if counts != [1] else ''}"


def _show_next(
    checkpoint: Checkpoint,
    name: str,
    recipe: Recipe | None,
    path: Path | None,
    advice: Advice,
    proposal: Fitted,
) -> None:
    """How to get what is proposed: options for the recipe that was given, or a recipe; and how to
    serve it."""
    from quantflow.pipeline.advice import cache_share, recipe_draft, settings

    c, question = proposal.candidate, advice.question
    served = name
    if c.scheme and recipe:
        options, lacking = settings(c, [stage.name for stage in recipe.stages])
        console.print(
            f"\nquantflow run {shlex.quote(str(path))} --model {shlex.quote(name)}"
            f" {' '.join(options)}"
        )
        if lacking:
            console.print(f"after adding to its stages: {', '.join(lacking)}")
        if recipe.weights.overrides:
            console.print("Its weights.overrides stay, and are not counted here.")
        served = recipe.output
    elif draft := recipe_draft(checkpoint, name, c):
        console.print(f"\nA recipe for that:\n{draft.text}")
        served = f"artifacts/{draft.name}"
    options = [f"--session-len {question.context}", f"--max-batch-size {question.batch}"]
    options += ["--kv int8"] if c.int8_kv else ["--kv full"]
    options += [f"--tp {c.tp}"] if c.tp > 1 else []
    options += (
        [f"--cache-max-entry-count {share}"] if (share := cache_share(question, proposal)) else []
    )
    console.print(f"quantflow serve {shlex.quote(served)} {' '.join(options)}")
