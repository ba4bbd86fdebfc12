"""Two releases side by side: what each number was and is, and what has become worse."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantflow.checkpoints.directory import read_json
from quantflow.errors import Problem, UserError
from quantflow.paths import absent
from quantflow.units import ROUNDING, is_number

INDEX_FILE = "release.json"


@dataclass(frozen=True)
class Metric:
    """A number of an artifact. floor: a rise below this is none, the last digits of a small sample;
    None: shown, not judged. unit: what it is shown in. least: what it cannot be less than."""

    title: str
    form: str
    floor: float | None
    unit: float = 1.0
    least: float = ROUNDING


# All are the better the smaller. Perplexity is judged by what of it is due to quantisation,
# log(perplexity / the original's): a tenth of perplexity itself is far more than any quantisation
# worth releasing costs. Top-1 agreement is judged by what is missing from it: 99% to 98% is twice
# as many other tokens.
METRICS: dict[str, Metric] = {
    "perplexity": Metric("perplexity", ".4f", None),
    "perplexity_excess": Metric("excess, nats", ".4f", 1e-3, least=-1e300),
    "kl_mean": Metric("KL mean", ".5f", 1e-5),
    "kl_p99": Metric("KL p99", ".4f", 1e-4),
    "disagreement": Metric("other top-1", ".2%", 1e-3),
    "bytes": Metric("MiB", ",.1f", None, 2.0**20),
}


def read_release(place: Path) -> dict[str, Any]:
    """The release.json at `place`, or in that folder. Raises UserError."""
    path = place / INDEX_FILE if place.is_dir() else place
    if not path.is_file():
        raise UserError(
            Problem(
                str(path), absent(path, "file"), f"a former release's folder, or its {INDEX_FILE}"
            )
        )
    index = read_json(path)
    entries = index.get("artifacts")
    if not isinstance(entries, dict) or not all(
        isinstance(e, dict) and isinstance(e.get("numbers"), dict) for e in entries.values()
    ):
        raise UserError(
            Problem(
                str(path),
                "no entry of artifacts with their numbers",
                f"the {INDEX_FILE} of `quantflow release`",
            )
        )
    if problems := [
        problem
        for name, entry in entries.items()
        for problem in _number_problems(f"{path} {name}", entry)
    ]:
        raise UserError(problems)
    return index


def _number_problems(where: str, entry: Mapping[str, Any]) -> Iterator[Problem]:
    """Of an entry of release.json. Where quality was measured every number is there: one that
    lacked would never be worse."""
    numbers, measured_on = entry["numbers"], entry.get("measured_on")
    if measured_on is not None and not isinstance(measured_on, str):
        yield Problem(f"{where} measured_on", json.dumps(measured_on)[:80], "text, or null")
    for key, value in numbers.items():
        metric = METRICS.get(key)
        if not is_number(value):
            yield Problem(f"{where} {key}", json.dumps(value)[:80], "a number")
        elif metric and value < metric.least:
            yield Problem(f"{where} {key}", str(value), "a number from 0 on")
    if lacking := [
        key for key in METRICS if key not in numbers and (measured_on or key == "bytes")
    ]:
        yield Problem(
            where,
            f"numbers without {', '.join(lacking)}",
            f"those of `quantflow release`: {', '.join(METRICS)}",
        )


def compare_releases(
    before: Mapping[str, Any], now: Mapping[str, Any], tolerance: float
) -> dict[str, Any]:
    """comparison.json: per artifact each number before and now, what is worse beyond the tolerance
    in words, and why nothing is judged. A `change` is relative, and None where there was nothing,
    or less than nothing, to begin from."""
    rows: dict[str, Any] = {}
    for name, entry in now["artifacts"].items():
        former = before["artifacts"].get(name)
        row: dict[str, Any] = {"note": _not_judged(former, entry), "numbers": {}, "worse": []}
        for key, metric in METRICS.items():
            value = entry["numbers"].get(key)
            old = former["numbers"].get(key) if former else None
            if value is None and old is None:
                continue
            change = value / old - 1 if value is not None and old is not None and old > 0 else None
            row["numbers"][key] = {"previous": old, "now": value, "change": change}
            if row["note"] or metric.floor is None or value is None or old is None:
                continue
            # An excess can be below 0; what is no number is worse.
            if not value <= old + tolerance * abs(old) + metric.floor:
                row["worse"].append(
                    f"{metric.title} is {value:{metric.form}}, in the previous release"
                    f" {old:{metric.form}}; a rise by {tolerance:.0%} is tolerated"
                )
        rows[name] = row
    gone = sorted(set(before["artifacts"]) - set(now["artifacts"]))
    return {
        "previous": before.get("quantflow"),
        "now": now["quantflow"],
        "tolerance": tolerance,
        "artifacts": rows,
        "gone": gone,
    }


def _not_judged(former: Mapping[str, Any] | None, entry: Mapping[str, Any]) -> str:
    """Why an artifact's quality cannot be held against the previous release's; empty where it
    can."""
    if former is None:
        return "new"
    if not former.get("measured_on") or not entry["measured_on"]:
        return "not judged: its quality was not measured in both releases"
    if former["measured_on"] != entry["measured_on"]:
        return "not judged: measured against another model, on another text, or in another way"
    return ""


def table(
    index: Mapping[str, Any], comparison: Mapping[str, Any] | None
) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the numbers of a release, each with its change since the previous one where
    it has changed."""
    heads = [
        "artifact",
        "status",
        *(metric.title for metric in METRICS.values()),
        *(["against before"] if comparison else []),
    ]
    rows = []
    for name, entry in index["artifacts"].items():
        row = [name, entry["status"]]
        compared = comparison["artifacts"][name] if comparison else None
        for key, metric in METRICS.items():
            value = entry["numbers"].get(key)
            text = "–" if value is None else f"{value / metric.unit:{metric.form}}"
            change = compared["numbers"].get(key, {}).get("change") if compared else None
            row.append(f"{text} ({change:+.1%})" if change and abs(change) >= 5e-4 else text)
        if compared:
            row.append(compared["note"] or ("worse" if compared["worse"] else "ok"))
        rows.append(row)
    return heads, rows


def worse(comparison: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name of the artifact and what is worse, of all."""
    return [(name, text) for name, row in comparison["artifacts"].items() for text in row["worse"]]
