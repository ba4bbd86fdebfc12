"""A release: several recipes' artifacts in one folder, judged together, with where they come from and what has changed.

<output>/<name>/               an artifact, built where it stays: nothing is written twice
<output>/<name>.intoto.json    its provenance, ready to be signed
<output>/release.json          an entry an artifact: status, quality, sizes, fingerprint
<output>/comparison.json       the same numbers beside the previous release's, and what is worse; with `previous` alone
<output>/release.md            both, for people
<output>/SHA256SUMS            every file above, for `sha256sum -c`. Written last: a folder without it is no release
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
from quantflow.artifacts.artifact import MANIFEST, RUN, read_manifest
from quantflow.artifacts.fingerprint import digest, file_digest
from quantflow.artifacts.provenance import SUFFIX, SUMS, Invocation, checksums, is_uri, own_source, resource, statement
from quantflow.artifacts.store import write_atomic, write_json
from quantflow.calibration.data import HUB, bundled
from quantflow.errors import ModelError, OutputError, Problem, UserError
from quantflow.evaluate.variants import deployed
from quantflow.models.checkpoint import TOKENIZER_FILES
from quantflow.models.directory import INDEX, read_json
from quantflow.pipeline.plan import Plan, make_plan
from quantflow.pipeline.progress import Progress
from quantflow.pipeline.run import run as run_plan
from quantflow.recipe import Calibration, Evaluate, load_recipe

INDEX_FILE, COMPARISON, SUMMARY = "release.json", "comparison.json", "release.md"


@dataclass(frozen=True)
class Metric:
    """A number of an artifact. floor: a rise below this is none, the last digits of a small sample; None: shown, not judged. unit: what
    it is shown in."""

    title: str
    form: str
    floor: float | None
    unit: float = 1.0


# All are the better the smaller. Top-1 agreement is judged by what is missing from it: 99% to 98% is twice as many other tokens.
METRICS: dict[str, Metric] = {
    "perplexity": Metric("perplexity", ".4f", 1e-3),
    "kl_mean": Metric("KL mean", ".5f", 1e-5),
    "kl_p99": Metric("KL p99", ".4f", 1e-4),
    "disagreement": Metric("other top-1", ".2%", 1e-3),
    "bytes": Metric("MiB", ",.1f", None, 2.0**20),
}


@dataclass(frozen=True)
class Released:
    """output: the folder. index: release.json. comparison: comparison.json, None without a previous release. failures: missed gates and
    what is worse than before, of all artifacts."""

    output: Path
    index: dict[str, Any]
    comparison: dict[str, Any] | None
    failures: list[Problem]


def plan_release(recipes: Sequence[Path], output: Path, overrides: Sequence[str] = (), *, device: str = "auto") -> list[Plan]:
    """A plan a recipe, its artifact in `output` under the recipe's name; `overrides` go to all. Raises UserError, with the problems of
    all recipes."""
    problems: list[Problem] = []
    plans: list[Plan] = []
    if (output / MANIFEST).is_file():
        problems.append(Problem(str(output), "an artifact", "a folder for several", "Pass another --output DIR"))
    for path in recipes:
        try:
            recipe = load_recipe(path, overrides)
            plans.append(make_plan(recipe.model_copy(update={"output": str(output / recipe.name)}), device=device))
        except UserError as error:
            problems += [p if str(path) in p.where else replace(p, where=f"{path}: {p.where}") for p in error.problems]
    names = Counter(plan.recipe.name for plan in plans)
    problems += [Problem("recipes", f"{count} are called {name}", "a name each") for name, count in names.items() if count > 1]
    if problems:
        raise UserError(problems)
    return plans


def read_release(place: Path) -> dict[str, Any]:
    """The release.json at `place`, or in that folder. Raises UserError."""
    path = place / INDEX_FILE if place.is_dir() else place
    if not path.is_file():
        raise UserError(Problem(str(path), "no such file", f"a former release's folder, or its {INDEX_FILE}"))
    index = read_json(path)
    entries = index.get("artifacts")
    if not isinstance(entries, dict) or not all(isinstance(e, dict) and isinstance(e.get("numbers"), dict) for e in entries.values()):
        raise UserError(Problem(str(path), "no entry of artifacts with their numbers", f"the {INDEX_FILE} of `quantflow release`"))
    for name, entry in entries.items():
        if odd := [k for k, v in entry["numbers"].items() if not isinstance(v, int | float)]:
            raise UserError(Problem(f"{path} {name} {odd[0]}", repr(entry["numbers"][odd[0]])[:80], "a number"))
    return index


def release(
    plans: Sequence[Plan], output: Path, invocation: Invocation, progress: Progress, *, previous: Path | None = None, tolerance: float = 0.1
) -> Released:
    """Runs every plan, or finds its artifact finished, and writes what makes them a release.

    A recipe that fails does not keep the others from being run: missed gates, and numbers worse than the previous release's by more than
    `tolerance` (relative), are in the result. Raises UserError for what is wrong with a recipe or its text, after all the others have run;
    there is no release then, but what was built is found again.
    """
    if not is_uri(invocation.builder_id):
        raise UserError(Problem("--builder-id", repr(invocation.builder_id), "a URI, such as https://ci.example.org/quantflow"))
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise UserError(Problem("--tolerance", str(tolerance), "a number from 0 on: 0.1 allows numbers to be a tenth worse"))
    before = read_release(previous) if previous else None
    if previous and (previous if previous.is_dir() else previous.parent).resolve() == output.resolve():
        raise OutputError(Problem(str(output), "holds the previous release, which would be lost", "another folder", "Pass --output DIR"))
    for name in (SUMS, INDEX_FILE, COMPARISON, SUMMARY):
        (output / name).unlink(missing_ok=True)

    problems: list[Problem] = []
    for number, plan in enumerate(plans, 1):
        progress.note(f"{plan.recipe.name} ({number} of {len(plans)})")
        try:
            run_plan(plan, progress)
        except UserError as error:
            problems += [replace(problem, where=f"{plan.recipe.name}: {problem.where}") for problem in error.problems]
    if problems:
        raise UserError(problems)

    entries: dict[str, Any] = {}
    digests: dict[str, str] = {}
    source = own_source()
    for plan in plans:
        name, manifest = plan.recipe.name, _manifest(plan)
        files = {f"{name}/{file}": entry["sha256"] for file, entry in manifest["files"].items()}
        files[f"{name}/{MANIFEST}"] = file_digest(plan.output / MANIFEST)
        # run.json holds times: it is outside the artifact's identity, and so no subject.
        stated = statement(
            files,
            {"recipe": manifest["recipe"]},
            {"quantflow": manifest["quantflow"], "device": plan.device, "fingerprint": manifest["fingerprint"]},
            [*dependencies(plan, manifest), *([source] if source else [])],
            invocation,
            read_json(plan.output / RUN),
        )
        write_json(output / f"{name}{SUFFIX}", stated)
        digests |= {**files, f"{name}/{RUN}": file_digest(plan.output / RUN)}
        entries[name] = _entry(plan, manifest)
    index = {"quantflow": __version__, "artifacts": entries}
    comparison = compare_releases(before, index, tolerance) if before else None
    failures = [(name, text) for name, entry in entries.items() for text in entry["failed_gates"]]
    if comparison:
        failures += [(name, text) for name, row in comparison["artifacts"].items() for text in row["worse"]]
    _write(output, index, comparison)
    written = [INDEX_FILE, SUMMARY, *([COMPARISON] if comparison else []), *(f"{name}{SUFFIX}" for name in entries)]
    digests |= {name: file_digest(output / name) for name in written}
    write_atomic(output / SUMS, checksums(digests).encode())
    return Released(output, index, comparison, [Problem(*failure, hint="The artifact is kept") for failure in failures])


def _manifest(plan: Plan) -> dict[str, Any]:
    manifest = read_manifest(plan.output)
    if manifest is None:
        raise ModelError(Problem(str(plan.output), "has no manifest any more", "the artifact that was just made", "Run the command again"))
    return manifest


def dependencies(plan: Plan, manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the artifact was made from: the model's files with their hashes, and the texts."""
    revision = plan.checkpoint.path.name if re.fullmatch(r"[0-9a-f]{40}", plan.checkpoint.path.name) else None
    if not Path(plan.model).expanduser().exists():
        yield resource(plan.model, "model", uri=f"pkg:huggingface/{plan.model}{f'@{revision}' if revision else ''}")
    for name, sha256 in sorted(manifest["source"]["files"].items()):
        yield resource(name, "weights", sha256=sha256)
    places = {plan.checkpoint.path / name for name in ("config.json", INDEX)}
    places |= {plan.checkpoint.tokenizer_path / name for name in TOKENIZER_FILES}
    for path in sorted(places):
        if path.is_file():
            yield resource(path.name, "configuration", sha256=file_digest(path))
    if plan.recipe.calibration and manifest["calibration"]:
        yield _text(plan.recipe.calibration, "calibration", tokens_sha256=manifest["calibration"]["tokens"])
    if evaluate := plan.stage(Evaluate):
        yield _text(evaluate, "evaluation")


def _text(section: Calibration | Evaluate, role: str, **notes: Any) -> dict[str, Any]:
    path = _text_file(section)
    if path:
        return resource(path.name, role, sha256=file_digest(path), **notes)
    return resource(section.data, role, uri=f"https://huggingface.co/datasets/{HUB[section.data][0]}", **notes)


def _text_file(section: Calibration | Evaluate) -> Path | None:
    """The local file that a section's text comes from; None where that is the hub."""
    path = Path(section.file or section.data).expanduser()
    if not section.file and (own := bundled(section.data)):
        return own
    return path if path.is_file() else None


def _entry(plan: Plan, manifest: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {file: entry["bytes"] for file, entry in manifest["files"].items()}
    formats = {
        name: sum(size for file, size in sizes.items() if folder == "." or file.startswith(f"{folder}/"))
        for name, folder in manifest["formats"].items()
    }
    numbers: dict[str, float] = {"bytes": sum(sizes.values())}
    if final := deployed(manifest["quality"]):
        numbers = {name: final[name] for name in ("perplexity", "kl_mean", "kl_p99")} | {"disagreement": 1 - final["top1"]} | numbers
    return {
        "directory": plan.recipe.name,
        "provenance": f"{plan.recipe.name}{SUFFIX}",
        "status": manifest["status"],
        "failed_gates": manifest["failed_gates"],
        "fingerprint": manifest["fingerprint"],
        "format_bytes": formats,
        "files": len(sizes),
        "quality": manifest["quality"],
        "measured_on": _measured_on(plan, manifest),
        "numbers": numbers,
    }


def _measured_on(plan: Plan, manifest: Mapping[str, Any]) -> str | None:
    """Identity of the model, text and settings of the measurement: numbers of two that differ in them cannot be compared."""
    evaluate = plan.stage(Evaluate)
    if evaluate is None:
        return None
    path = _text_file(evaluate)
    settings = evaluate.model_dump(mode="json", exclude={"gates", "data", "file"})
    return digest([manifest["source"]["weights"], settings, file_digest(path) if path else evaluate.data])


# Against the previous release


def compare_releases(before: Mapping[str, Any], now: Mapping[str, Any], tolerance: float) -> dict[str, Any]:
    """comparison.json: per artifact each number before and now, what is worse beyond the tolerance in words, and why nothing is judged."""
    rows: dict[str, Any] = {}
    for name, entry in now["artifacts"].items():
        former = before["artifacts"].get(name)
        row: dict[str, Any] = {"note": _not_judged(former, entry), "numbers": {}, "worse": []}
        for key, metric in METRICS.items():
            value = entry["numbers"].get(key)
            old = former["numbers"].get(key) if former else None
            if value is None and old is None:
                continue
            change = value / old - 1 if value is not None and old else None
            row["numbers"][key] = {"previous": old, "now": value, "change": change}
            if row["note"] or metric.floor is None or value is None or old is None:
                continue
            if not value <= old * (1 + tolerance) + metric.floor:  # so that what is no number is worse
                row["worse"].append(
                    f"{metric.title} is {value:{metric.form}}, in the previous release {old:{metric.form}}; "
                    f"a rise by {tolerance:.0%} is tolerated"
                )
        rows[name] = row
    gone = sorted(set(before["artifacts"]) - set(now["artifacts"]))
    return {"previous": before.get("quantflow"), "now": now["quantflow"], "tolerance": tolerance, "artifacts": rows, "gone": gone}


def _not_judged(former: Mapping[str, Any] | None, entry: Mapping[str, Any]) -> str:
    """Why an artifact's quality cannot be held against the previous release's; empty where it can."""
    if former is None:
        return "new"
    if not former.get("measured_on") or not entry["measured_on"]:
        return "not judged: its quality was not measured in both releases"
    if former["measured_on"] != entry["measured_on"]:
        return "not judged: measured against another model, or on another text"
    return ""


def table(index: Mapping[str, Any], comparison: Mapping[str, Any] | None) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the numbers of a release, each with its change since the previous one where it has changed."""
    heads = ["artifact", "status", *(metric.title for metric in METRICS.values()), *(["against before"] if comparison else [])]
    rows = []
    for name, entry in index["artifacts"].items():
        row = [name, entry["status"]]
        found = comparison["artifacts"][name] if comparison else None
        for key, metric in METRICS.items():
            value = entry["numbers"].get(key)
            text = "–" if value is None else f"{value / metric.unit:{metric.form}}"
            change = found["numbers"].get(key, {}).get("change") if found else None
            row.append(f"{text} ({change:+.1%})" if change and abs(change) >= 5e-4 else text)
        if found:
            row.append(found["note"] or ("worse" if found["worse"] else "ok"))
        rows.append(row)
    return heads, rows


def _write(output: Path, index: Mapping[str, Any], comparison: Mapping[str, Any] | None) -> None:
    """The index, the comparison, and their page. A page that shows several reports side by side would be written here, too."""
    write_json(output / INDEX_FILE, index)
    if comparison:
        write_json(output / COMPARISON, comparison)
    heads, rows = table(index, comparison)
    lines = [f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows]]
    worse = [f"- {name}: {text}" for name, entry in index["artifacts"].items() for text in entry["failed_gates"]]
    if comparison:
        worse += [f"- {name}: {text}" for name, row in comparison["artifacts"].items() for text in row["worse"]]
        worse += [f"- {name}: no longer in the release" for name in comparison["gone"]]
    write_atomic(output / SUMMARY, ("\n".join([*lines, *([""] if worse else []), *worse]) + "\n").encode())
