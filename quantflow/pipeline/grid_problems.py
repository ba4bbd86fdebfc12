"""What stands against the schemes of a plan, and against what its packs write."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from difflib import get_close_matches
from typing import TYPE_CHECKING

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.errors import Problem
from quantflow.formats import FORMATS
from quantflow.formats.base import Format
from quantflow.formats.weight import Weight, usual_group
from quantflow.pipeline.cached import latent_problem
from quantflow.pipeline.linears import LinearPlan, inputs_of_rank
from quantflow.recipe.overrides import matches
from quantflow.stages.kv_qparams import KvQparams
from quantflow.stages.pack import Pack
from quantflow.stages.pack_prepare import Prepared

if TYPE_CHECKING:
    from quantflow.pipeline.plan import Plan

_HEAD = "lm_head"  # what recipes call the head, whatever the family does


def grid_problems(plan: Plan) -> list[Problem]:
    """What stands against the packs: one problem a kind of linear and cause, not one a layer; what
    the formats cannot say of the whole; and overrides that match nothing."""
    by_cause: dict[tuple[str, str], Problem] = {}
    problems: list[Problem] = []
    linears = {linear.module: linear for linear in plan.linears}
    if plan.rounds and not any(linear.scheme for linear in plan.linears):
        problems.append(Problem("weights", "every linear is ignored", "something to quantise"))
    if not plan.rounds:
        plain = [name for name, form in FORMATS.items() if form.holds_plain]
        expected, hint = (
            f"one of {', '.join(plain)}, which hold plain weights",
            "Add `- rtn`, or `- gptq`, to quantise them",
        )
        wrong = [pack for pack in plan.packs if pack.format not in plain]
        problems += [
            Problem(f"pack {pack.format}", "no stage rounds the weights", expected, hint)
            for pack in wrong
        ]
    for pack, prepared in zip(plan.packs, plan.prepared, strict=True):
        for problem in prepared.modules:
            linear = linears[problem.where]
            assert linear.scheme is not None
            # A grid of another kind is one fact, whatever linear it is said of.
            leaf = (
                linear.name.rpartition(".")[2]
                if FORMATS[pack.format].holds_numbers(linear.scheme.kind)
                else ""
            )
            if (leaf, problem.found) not in by_cause:
                hint = "; for instance ".join(
                    filter(
                        None, (problem.hint, _advice(plan, linear, problem, FORMATS[pack.format]))
                    )
                )
                where = f"{linear.module} (pack {pack.format})"
                by_cause[leaf, problem.found] = Problem(
                    where, problem.found, problem.expected, hint
                )
        problems += (problem for problem in prepared.whole if problem not in problems)
        if not prepared.modules:
            if pack.kv_scales:
                problems += _kv_problems(plan, pack)
            if not pack.requantize:
                problems += _chances(plan, pack, prepared)
    problems = [*by_cause.values(), *problems]
    # Of `ignore` the same is a warning: lists that are written for many models name what this one
    # has not, and nothing comes of it.
    useless = (
        unmatched(plan, "weights.overrides match", o.match, ignores=o.ignore)
        for o in plan.recipe.weights.overrides
    )
    problems += filter(None, useless)
    heads = _HEAD, plan.checkpoint.architecture.head
    if not any(matches(head, p) for head in heads for p in plan.recipe.weights.ignore):
        problems.append(
            Problem(
                "weights.ignore",
                f"{_HEAD} is not in it",
                _HEAD,
                "QuantFlow quantises the decoder's linears; the head stays as it is",
            )
        )
    return problems


def unmatched(plan: Plan, where: str, pattern: str, *, ignores: bool) -> Problem | None:
    """What is said of a pattern that matches no linear. ignores: a router or a norm, which nobody
    quantises, may be left alone too."""
    modules = [
        *(linear.module for linear in plan.linears),
        *(_other_modules(plan.checkpoint) if ignores else ()),
    ]
    if any(matches(module, pattern) for module in modules):
        return None
    leaves = dict.fromkeys(module.rpartition(".")[2] for module in modules)
    parent, dot, leaf = pattern.rpartition(".")
    # a router's `gate` is no slip for `gate_proj`
    near = get_close_matches(leaf, leaves, n=1, cutoff=0.75)
    hint = f"Did you mean {f'{parent}{dot}{near[0]}'!r}?" if near else ""
    return Problem(
        f"{where} {pattern!r}",
        "matches no linear of the model",
        f"a pattern such as *.{next(iter(leaves))}",
        hint,
    )


def _other_modules(checkpoint: Checkpoint) -> Iterator[str]:
    """The head, which a tied model has no tensor of, and the modules of all weights: routers, norms
    and embeddings too."""
    yield from (_HEAD, checkpoint.architecture.head)
    yield from (
        name.removesuffix(".weight") for name in checkpoint.expected if name.endswith(".weight")
    )


def _advice(plan: Plan, linear: LinearPlan, problem: Problem, form: Format) -> str:
    """What to write into the recipe; "" where the problem's own hint says it."""
    assert linear.scheme is not None
    leaf, change = linear.name.rpartition(".")[2], "ignore: true"
    if not form.holds_numbers(linear.scheme.kind):
        return ""
    if "group_size" in problem.expected:
        inputs = {
            p.module: inputs_of_rank(plan.checkpoint, plan.tp, p)
            for p in plan.linears
            if p.scheme is not None
        }
        if form.shares_scheme(linear.module):  # which has no place for overrides
            k = math.gcd(*inputs.values())
            return f"weights.group_size: {usual_group(k, linear.scheme.group_of(k))}"
        channels = inputs[linear.module]
        fitting = replace(
            linear.scheme, group_size=usual_group(channels, linear.scheme.group_of(channels))
        )
        if not form.check(Weight(linear.module, (linear.shape[0], channels), fitting)):
            change = f"group_size: {fitting.group_size}"
    elif "asymmetric" in problem.found:
        change = "symmetric: true"
    return f'weights.overrides: [{{match: "*.{leaf}", {change}}}]'


def _kv_problems(plan: Plan, pack: Pack) -> list[Problem]:
    """What keeps KV scales from being written into the checkpoint itself."""
    where, problems = f"pack {pack.format} kv_scales", []
    if pack.kv_scales not in FORMATS[pack.format].kv_scales:
        holding = [name for name, form in FORMATS.items() if pack.kv_scales in form.kv_scales]
        problems.append(
            Problem(
                where,
                f"the format {pack.format}",
                f"{', '.join(holding)}, which has names for them",
            )
        )
    elif latent := latent_problem(plan.checkpoint):
        problems.append(Problem(where, *latent))
    if plan.stage(KvQparams) is None:
        problems.append(
            Problem(where, "no stage kv_qparams", "`- kv_qparams`, which measures K and V")
        )
    return problems


def _chances(plan: Plan, pack: Pack, prepared: Prepared) -> Iterator[Problem]:
    """What the format holds only if the numbers happen to be so."""
    kv = plan.stage(KvQparams)
    granularity = kv.granularity if kv else None
    hint = "Set requantize: true in pack, which reports the error"
    for chance in prepared.job.format.chances(prepared.job.request, granularity):
        yield replace(chance, where=f"pack {pack.format}", hint=hint)
