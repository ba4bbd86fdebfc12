"""A release: several recipes' artifacts in one folder, judged together, with where they come from
and what has changed.

<output>/<name>/                  an artifact, built where it stays: nothing is written twice
<output>/<name>.intoto.json       its provenance, ready to be signed
<output>/<name>.comparison.html   its report beside the previous release's, where `previous` is a
                                  folder that holds that one's
<output>/release.json             an entry an artifact: status, quality, sizes, fingerprint
<output>/comparison.json          the same numbers beside the previous release's, and what is worse;
                                  with `previous` alone
<output>/release.md               both, for people
<output>/SHA256SUMS               every file above, for `sha256sum -c`. Written last: a folder
                                  without it is no release
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantflow import __version__
from quantflow.artifacts.artifact import MANIFEST, PAGE, REPORT, RUN, read_manifest
from quantflow.artifacts.fingerprint import file_digest
from quantflow.artifacts.provenance import (
    SUFFIX,
    SUMS,
    Invocation,
    checksums,
    is_uri,
    own_source,
    resource,
    statement,
)
from quantflow.artifacts.store import write_atomic, write_json
from quantflow.calibration.data import HUB
from quantflow.checkpoints.directory import read_json
from quantflow.checkpoints.weight_files import INDEX
from quantflow.errors import ModelError, OutputError, Problem, UserError
from quantflow.evaluate.variants import deployed
from quantflow.pipeline.plan import Plan, make_plan
from quantflow.pipeline.progress import Progress
from quantflow.pipeline.release_comparison import (
    INDEX_FILE,
    compare_releases,
    read_release,
    table,
    worse,
)
from quantflow.pipeline.run import run as run_plan
from quantflow.pipeline.texts import local_text
from quantflow.recipe import NamesText
from quantflow.report.comparison import comparison_page, make_comparison
from quantflow.report.measurement import measured_on
from quantflow.report.page import write_page
from quantflow.stages.evaluate import Evaluate
from quantflow.stages.registry import load_recipe
from quantflow.tokenizers.load import tokenizer_files

COMPARISON, SUMMARY = "comparison.json", "release.md"
PAGE_SUFFIX = ".comparison.html"


@dataclass(frozen=True)
class Released:
    """output: the folder. index: release.json. comparison: comparison.json, None without a previous
    release. failures: missed gates and what is worse than before, of all artifacts. others: what
    else lies in the folder and is no part of the release."""

    output: Path
    index: dict[str, Any]
    comparison: dict[str, Any] | None
    failures: list[Problem]
    others: list[str]


def plan_release(
    recipes: Sequence[Path], output: Path, overrides: Sequence[str] = (), *, device: str = "auto"
) -> list[Plan]:
    """A plan a recipe, its artifact in `output` under the recipe's name; `overrides` go to all.
    Raises UserError, with the problems of all recipes."""
    problems: list[Problem] = []
    plans: list[Plan] = []
    names: list[str] = []
    if (output / MANIFEST).is_file():
        problems.append(
            Problem(str(output), "an artifact", "a folder for several", "Pass another --output DIR")
        )
    for path in recipes:
        try:
            recipe = load_recipe(path, overrides)
            names.append(recipe.name)
            plans.append(
                make_plan(
                    recipe.model_copy(update={"output": str(output / recipe.name)}), device=device
                )
            )
        except UserError as error:
            problems += [
                p if str(path) in p.where else replace(p, where=f"{path}: {p.where}")
                for p in error.problems
            ]
    problems += _name_problems(names)
    if problems:
        raise UserError(problems)
    return plans


def _name_problems(names: Sequence[str]) -> list[Problem]:
    """Of artifacts' names that would be one folder, or a file of the release. Not all file systems
    tell `a` from `A`: both are refused, so that a release can be unpacked anywhere."""
    counts, problems = Counter(names), []
    own = {
        file.casefold(): f"the release's own {file}"
        for file in (SUMS, INDEX_FILE, COMPARISON, SUMMARY)
    }
    for name in counts:
        own |= {
            f"{name}{suffix}".casefold(): f"what is written beside {name}"
            for suffix in (SUFFIX, PAGE_SUFFIX)
        }
    first: dict[str, str] = {}
    for name, count in counts.items():
        if count > 1:
            problems.append(Problem("recipes", f"{count} are called {name}", "a name each"))
        if (other := first.setdefault(name.casefold(), name)) != name:
            problems.append(
                Problem(
                    "recipes",
                    f"{other} and {name} differ only in case",
                    "names that are different on every file system",
                )
            )
        if name.casefold() in own:
            problems.append(
                Problem(
                    "recipes",
                    f"one is called {name}",
                    f"another name: that is {own[name.casefold()]}",
                )
            )
    return problems


def release(
    plans: Sequence[Plan],
    output: Path,
    invocation: Invocation,
    progress: Progress,
    *,
    previous: Path | None = None,
    tolerance: float = 0.1,
) -> Released:
    """Runs every plan, or finds its artifact finished, and writes what makes them a release.

    A recipe that fails does not keep the others from being run: missed gates, and numbers worse
    than the previous release's by more than `tolerance` (relative), are in the result. Raises
    UserError for what is wrong with a recipe or its text, after all the others have run; there is
    no release then, but what was built is found again.
    """
    before = _check(output, invocation, previous, tolerance)
    names = [plan.recipe.name for plan in plans]
    for name in (
        SUMS,
        INDEX_FILE,
        COMPARISON,
        SUMMARY,
        *(f"{name}{PAGE_SUFFIX}" for name in names),
    ):
        (output / name).unlink(missing_ok=True)
    _run_all(plans, progress)

    source = own_source()
    digests: dict[str, str] = {}
    for plan in plans:
        digests |= _state(plan, output, invocation, source)
    entries = {plan.recipe.name: _entry(plan, _manifest(plan)) for plan in plans}
    index = {"quantflow": __version__, "artifacts": entries}
    comparison = compare_releases(before, index, tolerance) if before else None
    written = _write(output, index, comparison)
    written += _write_pages(output, previous, names, progress) if previous else []
    digests |= {name: file_digest(output / name) for name in written}
    write_atomic(output / SUMS, checksums(digests).encode())

    missed = [(name, text) for name, entry in entries.items() for text in entry["failed_gates"]]
    failures = [
        Problem(*failure, hint="The artifact is kept")
        for failure in missed + (worse(comparison) if comparison else [])
    ]
    parts = {SUMS, *(name.split("/")[0] for name in digests)}
    others = sorted(
        path.name
        for path in output.iterdir()
        if path.name not in parts and not path.name.startswith(".")
    )
    return Released(output, index, comparison, failures, others)


def _check(
    output: Path, invocation: Invocation, previous: Path | None, tolerance: float
) -> dict[str, Any] | None:
    """The previous release's index. Raises UserError for what was asked for wrongly."""
    if not is_uri(invocation.builder_id):
        raise UserError(
            Problem(
                "--builder-id",
                repr(invocation.builder_id),
                "a URI, such as https://ci.example.org/quantflow",
            )
        )
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise UserError(
            Problem(
                "--tolerance",
                str(tolerance),
                "a number from 0 on: 0.1 allows numbers to be a tenth worse",
            )
        )
    before = read_release(previous) if previous else None
    if (
        previous
        and (previous if previous.is_dir() else previous.parent).resolve() == output.resolve()
    ):
        raise OutputError(
            Problem(
                str(output),
                "holds the previous release, which would be lost",
                "another folder",
                "Pass --output DIR",
            )
        )
    return before


def _run_all(plans: Sequence[Plan], progress: Progress) -> None:
    """Raises UserError with the problems of all plans, after every one has been run."""
    problems: list[Problem] = []
    for number, plan in enumerate(plans, 1):
        progress.note(f"{plan.recipe.name} ({number} of {len(plans)})")
        try:
            run_plan(plan, progress)
        except UserError as error:
            problems += [
                replace(problem, where=f"{plan.recipe.name}: {problem.where}")
                for problem in error.problems
            ]
    if problems:
        raise UserError(problems)


def _manifest(plan: Plan) -> dict[str, Any]:
    manifest = read_manifest(plan.output)
    if manifest is None:
        raise ModelError(
            Problem(
                str(plan.output),
                "has no manifest any more",
                "the artifact that was just made",
                "Run the command again",
            )
        )
    return manifest


def _state(
    plan: Plan, output: Path, invocation: Invocation, source: Mapping[str, Any] | None
) -> dict[str, str]:
    """Writes an artifact's statement. Returns name -> sha256 of the artifact's files and of the
    statement."""
    name, manifest = plan.recipe.name, _manifest(plan)
    files = {f"{name}/{file}": entry["sha256"] for file, entry in manifest["files"].items()}
    files |= {
        f"{name}/{file}": file_digest(plan.output / file)
        for file in (MANIFEST, PAGE)
        if (plan.output / file).is_file()
    }
    # run.json holds times: it is outside the artifact's identity, and so no subject.
    stated = statement(
        files,
        {"recipe": manifest["recipe"]},
        {
            "quantflow": manifest["quantflow"],
            "device": plan.device,
            "fingerprint": manifest["fingerprint"],
        },
        [*dependencies(plan, manifest), *([source] if source else [])],
        invocation,
        read_json(plan.output / RUN),
    )
    write_json(output / f"{name}{SUFFIX}", stated)
    return {
        **files,
        f"{name}/{RUN}": file_digest(plan.output / RUN),
        f"{name}{SUFFIX}": file_digest(output / f"{name}{SUFFIX}"),
    }


def dependencies(plan: Plan, manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the artifact was made from: the model's files with their hashes, and the texts."""
    revision = (
        plan.checkpoint.path.name
        if re.fullmatch(r"[0-9a-f]{40}", plan.checkpoint.path.name)
        else None
    )
    if not Path(plan.model).expanduser().exists():
        yield resource(
            plan.model,
            "model",
            uri=f"pkg:huggingface/{plan.model}{f'@{revision}' if revision else ''}",
        )
    for name, sha256 in sorted(manifest["source"]["files"].items()):
        yield resource(name, "weights", sha256=sha256)
    files = {
        name: plan.checkpoint.path / name for name in ("config.json", INDEX)
    } | tokenizer_files(plan.checkpoint.tokenizer_path)
    for name, path in sorted(files.items()):
        if path.is_file():
            yield resource(name, "configuration", sha256=file_digest(path))
    if plan.recipe.calibration and manifest["calibration"]:
        yield _text(
            plan.recipe.calibration, "calibration", tokens_sha256=manifest["calibration"]["tokens"]
        )
    if evaluate := plan.stage(Evaluate):
        evaluated = read_json(plan.output / REPORT)["evaluation"]
        yield _text(
            evaluate, "evaluation", tokens_sha256=evaluated["tokens"] if evaluated else None
        )


def _text(section: NamesText, role: str, **notes: Any) -> dict[str, Any]:
    """The local file that a section's text comes from, or its place on the hub."""
    if path := local_text(section):
        return resource(path.name, role, sha256=file_digest(path), **notes)
    return resource(
        section.data, role, uri=f"https://huggingface.co/datasets/{HUB[section.data][0]}", **notes
    )


def _entry(plan: Plan, manifest: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {file: entry["bytes"] for file, entry in manifest["files"].items()}
    formats = {
        name: sum(
            size for file, size in sizes.items() if folder == "." or file.startswith(f"{folder}/")
        )
        for name, folder in manifest["formats"].items()
    }
    return {
        "directory": plan.recipe.name,
        "provenance": f"{plan.recipe.name}{SUFFIX}",
        "status": manifest["status"],
        "failed_gates": manifest["failed_gates"],
        "fingerprint": manifest["fingerprint"],
        "format_bytes": formats,
        "files": len(sizes),
        "quality": manifest["quality"],
        "measured_on": measured_on(read_json(plan.output / REPORT)),
        "numbers": {**numbers(manifest["quality"]), "bytes": sum(sizes.values())},
    }


def numbers(quality: Mapping[str, Any]) -> dict[str, float]:
    """Of what was measured, the numbers that releases are compared by, as deployed; {} where
    nothing was."""
    final = deployed(quality)
    if not final:
        return {}
    excess = math.log(final["perplexity"] / final["reference_perplexity"])
    figures = {name: final[name] for name in ("perplexity", "kl_mean", "kl_p99")}
    return {**figures, "perplexity_excess": excess, "disagreement": 1 - final["top1"]}


def _write(
    output: Path, index: Mapping[str, Any], comparison: Mapping[str, Any] | None
) -> list[str]:
    """The index, the comparison, and both for people. Returns the files' names."""
    write_json(output / INDEX_FILE, index)
    if comparison:
        write_json(output / COMPARISON, comparison)
    heads, rows = table(index, comparison)
    lines = [f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows]]
    changes = [
        f"- {name}: {text}"
        for name, entry in index["artifacts"].items()
        for text in entry["failed_gates"]
    ]
    if comparison:
        changes += [f"- {name}: {text}" for name, text in worse(comparison)]
        changes += [f"- {name}: no longer in the release" for name in comparison["gone"]]
    write_atomic(
        output / SUMMARY,
        ("\n".join([*lines, *([""] if changes else []), *changes]) + "\n").encode(),
    )
    return [INDEX_FILE, SUMMARY, *([COMPARISON] if comparison else [])]


def _write_pages(
    output: Path, previous: Path, names: Sequence[str], progress: Progress
) -> list[str]:
    """A page for each artifact whose report is in the previous release's folder, too. Returns the
    files' names. A former report that this QuantFlow cannot read costs its page, which is said, and
    not the release."""
    written = []
    for name in names:
        if not (previous / name / REPORT).is_file():
            continue
        try:
            compared = make_comparison([previous / name, output / name])
        except UserError as error:
            progress.note(
                f"no {name}{PAGE_SUFFIX}: {error.problems[0].where}: {error.problems[0].found}"
            )
            continue
        write_page(
            output / f"{name}{PAGE_SUFFIX}",
            comparison_page(replace(compared, names=(f"{name} (previous)", name))),
        )
        written.append(f"{name}{PAGE_SUFFIX}")
    return written
