"""Several artifacts side by side: what differs in their recipes, and what came of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from quantflow.artifacts.artifact import EXPORT, read_manifest
from quantflow.errors import Problem, UserError
from quantflow.evaluate.variants import VARIANTS, deployed
from quantflow.report import plots
from quantflow.report.measurement import measured_on
from quantflow.report.page import read_report, render
from quantflow.report.pictures import Picture, Points, of_layers, positions

ABSENT = "–"


@dataclass(frozen=True)
class Difference:
    """Where recipes differ, and what each says there (None: nothing)."""

    path: str
    values: tuple[Any, ...]

    def shown(self) -> list[str]:
        return [
            ABSENT if v is None else v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)
            for v in self.values
        ]


@dataclass(frozen=True)
class Comparison:
    """names: of the artifacts, each once. reports: theirs. notes: what keeps figures from being set
    against each other."""

    names: tuple[str, ...]
    reports: tuple[Mapping[str, Any], ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """`artifacts`: name, fingerprint, status, bytes (of the first format), quality as deployed,
        every variant, the median output error; `differences` of the recipes; `notes`."""
        return {
            "artifacts": [
                _row(name, report) for name, report in zip(self.names, self.reports, strict=True)
            ],
            "differences": {d.path: list(d.values) for d in self.differences},
            "notes": list(self.notes),
        }


def make_comparison(folders: Sequence[Path]) -> Comparison:
    """Of artifacts and exports. Raises UserError with every folder that is neither."""
    if len(folders) < 2:
        raise UserError(Problem("compare", f"{len(folders)} artifact", "two or more"))
    problems: list[Problem] = []
    reports: list[dict[str, Any]] = []
    for folder in folders:
        try:
            reports.append(_of_export(folder) or read_report(folder))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    asked = [report["asked"] for report in reports]
    return Comparison(
        tuple(_names(folders, reports)),
        tuple(reports),
        tuple(differences(asked)),
        tuple(_notes(reports)),
    )


def _of_export(folder: Path) -> dict[str, Any] | None:
    """What a comparison wants of a report, from the manifest of an export; None for anything else.
    Raises ModelError."""
    manifest = read_manifest(folder)
    if manifest is None or manifest.get("kind") != EXPORT:
        return None
    source = manifest["source"]
    (form,) = manifest["formats"]
    how = {"from": source.get("format"), "to": form, "exact": source.get("exact")}
    return {
        "name": manifest["name"],
        "fingerprint": manifest["fingerprint"],
        "status": manifest["status"],
        "quality": manifest["quality"],
        "evaluation": manifest.get("evaluation"),
        "sizes": {form: manifest.get("bytes")},
        "profile": {},
        "linears": {},
        "fallbacks": {},
        "kept": {},
        "asked": {**(manifest.get("recipe") or {}), "export": how},
        "source": {"weights": source.get("weights"), "bytes": source.get("bytes")},
    }


def differences(recipes: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """The values that are not the same in all recipes, by path; stages are told by their names."""
    flat = [dict(_flat(recipe)) for recipe in recipes]
    paths = dict.fromkeys(path for values in flat for path in values)
    rows = [
        Difference(path, tuple(values.get(path) for values in flat))
        for path in paths
        if path != "name"
    ]
    return [d for d in rows if any(v != d.values[0] for v in d.values)]


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        if not value and path:
            yield path, {}
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    elif (
        isinstance(value, list)
        and value
        and all(isinstance(entry, dict) and len(entry) == 1 for entry in value)
    ):
        # Stages: by name, the second of a name with its number, so that one more stage shifts none
        # of the others.
        seen: dict[str, int] = {}
        for entry in value:
            ((name, settings),) = entry.items()
            seen[name] = seen.get(name, 0) + 1
            yield from _flat(
                settings, f"{path}.{name}" + (f"[{seen[name]}]" if seen[name] > 1 else "")
            )
    else:
        yield path, value


def comparison_page(comparison: Comparison) -> str:
    """The page, as HTML."""
    return render(
        "comparison.html",
        title=(
            " and ".join(comparison.names)
            if len(comparison.names) < 4
            else f"{len(comparison.names)} artifacts"
        ),
        rows=comparison.as_dict()["artifacts"],
        names=comparison.names,
        differences=comparison.differences,
        notes=comparison.notes,
        pictures=_pictures(comparison),
    )


def _row(name: str, report: Mapping[str, Any]) -> dict[str, Any]:
    errors = [line["error"] for line in report["linears"].values() if line.get("error") is not None]
    quality = report["quality"]
    return {
        "name": name,
        "fingerprint": report["fingerprint"],
        "status": report["status"],
        "bytes": next(iter(report["sizes"].values()), None),
        "source_bytes": report["source"]["bytes"],
        "quality": deployed(quality),
        "variants": quality,
        "median_error": median(errors) if errors else None,
        "fallbacks": len(report["fallbacks"]),
        "kept": len(report["kept"]),
    }


def _names(folders: Sequence[Path], reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to call each: its recipe's name, or its folder's where several have one."""
    names = [report["name"] for report in reports]
    if len(set(names)) == len(names):
        return names
    folder_names = [folder.resolve().name for folder in folders]
    return (
        folder_names
        if len(set(folder_names)) == len(folder_names)
        else [str(folder) for folder in folders]
    )


def _notes(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = []
    if len({r["source"]["weights"] for r in reports} - {None}) > 1:
        notes.append(
            "the artifacts come from different weights: their errors are to different originals"
        )
    if len({measured_on(r) for r in reports} - {None}) > 1:
        notes.append(
            "quality was measured against different originals, on different texts or in different"
            " ways: the figures cannot be set against each other"
        )
    return notes


def _pictures(comparison: Comparison) -> list[Picture]:
    def error(report: Mapping[str, Any]) -> Points:
        """The mean over a layer's linears."""
        layers: dict[int, list[float]] = {}
        for line in report["linears"].values():
            if line.get("error") is not None:
                layers.setdefault(line["layer"], []).append(line["error"])
        return [(layer, mean(values)) for layer, values in sorted(layers.items())]

    reports = dict(zip(comparison.names, comparison.reports, strict=True))
    profiles = {
        name: profile
        for name, report in reports.items()
        if (profile := deployed(report["profile"]))
    }
    wanted = (
        (
            "KL divergence by position",
            {n: positions(p) for n, p in profiles.items()},
            "position in the window",
            "KL, nats",
            "As deployed: with an int8 KV cache where the recipe has one.",
        ),
        (
            "Error of the residual stream after each layer",
            {n: of_layers(p) for n, p in profiles.items()},
            "layer",
            "relative error",
            "‖x̂ − x‖² / ‖x‖² against each artifact's own full-precision model.",
        ),
        (
            "Normalised output error, mean over a layer's linears",
            {n: error(r) for n, r in reports.items()},
            "layer",
            "relative error",
            "‖(W − Ŵ)X‖² / ‖WX‖² on the calibration text.",
        ),
    )
    pictures = []
    for n, (title, series, x, y, caption) in enumerate(wanted):
        if filled := {name: points for name, points in series.items() if points}:
            pictures.append(
                Picture(title, plots.lines(f"compare-{n}", filled, x=x, y=y, log=True), caption)
            )
    if profiles:
        variants = list(dict.fromkeys(v for r in comparison.reports for v in r["quality"]))
        bars = {
            v: [r["quality"].get(v, {}).get("kl_mean", math.nan) for r in comparison.reports]
            for v in variants
        }
        svg = plots.bars(
            "compare-kl",
            {VARIANTS.get(v, v): values for v, values in bars.items()},
            list(comparison.names),
            y="KL, nats",
        )
        pictures.insert(
            0, Picture("KL divergence", svg, "Mean per token to the full-precision model.")
        )
    return pictures
