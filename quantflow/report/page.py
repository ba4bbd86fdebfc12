"""`report.html`: one artifact's report to look at. A single file: nothing is fetched, nothing runs, it prints, light and dark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from quantflow.artifacts.artifact import MANIFEST, PAGE, REPORT, read_manifest
from quantflow.artifacts.fingerprint import file_digest
from quantflow.artifacts.store import write_atomic, write_json
from quantflow.errors import ModelError, OutputError, Problem
from quantflow.models.directory import read_json
from quantflow.report.pictures import largest, pictures
from quantflow.report.variants import VARIANTS, deployed
from quantflow.units import size

GATES = {"kl_mean": "KL mean", "kl_p99": "KL 99th percentile", "top1": "top-1", "perplexity_ratio": "perplexity ratio"}
WORST, LISTED = 12, 400  # linears shown at once, and in the list that can be opened


def read_report(folder: Path) -> dict[str, Any]:
    """The report of an artifact. Raises ModelError where there is none, or one of an older QuantFlow."""
    place = folder / REPORT
    if not place.is_file():
        found = "no report.json" if folder.is_dir() else "no such directory"
        raise ModelError(Problem(str(folder), found, "an artifact of `quantflow run`"))
    report = read_json(place)
    needed = {
        "version": int, "name": str, "asked": dict, "quality": dict, "profile": dict, "linears": dict, "activations": dict, "sizes": dict,
        "memory": list,
    }  # fmt: skip
    wrong = [key for key, kind in needed.items() if not isinstance(report.get(key), kind)]
    if wrong:
        hint = "Run the recipe again: finished layers are taken from the store"
        raise ModelError(Problem(str(place), f"nothing usable under {', '.join(wrong)}", "a report of this version of QuantFlow", hint))
    return report


def report_page(report: Mapping[str, Any]) -> str:
    """The page of a report, as HTML."""
    return render(
        "report.html",
        title=report["name"],
        r=report,
        final=deployed(report["quality"]),
        recipe=yaml.safe_dump(report["asked"], sort_keys=False, allow_unicode=True, width=100),
        schemes=Counter(f"{line['scheme']}, {line['method']}" for line in report["linears"].values()),
        gates=gates(report),
        variants=VARIANTS,
        pictures=pictures(report),
        memory=report["memory"],
        worst=worst(report["linears"])[:WORST],
        linears=worst(report["linears"])[:LISTED],
    )


def write_page(path: Path, page: str) -> None:
    """Writes a page at once or not at all. Raises OutputError."""
    try:
        write_atomic(path, page.encode())
    except OSError as error:
        raise OutputError(Problem(str(path), error.strerror or str(error), "a place that can be written")) from error


def render(template: str, **values: Any) -> str:
    """A template of this folder. Every value is escaped but the pictures, which are ours."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"size": size, "number": number, "share": share, "largest": largest}
    return environment.get_template(template).render(**values)


def number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def share(value: float) -> str:
    return f"{value:.2%}"


def gates(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every gate of the recipe: its limit, and what was found."""
    final = deployed(report["quality"])
    if not final:
        return []
    found = {**final, "perplexity_ratio": final["perplexity"] / final["reference_perplexity"]}
    missed = {text.split(" is ")[0] for text in report["failed_gates"]}
    return [
        {"name": GATES.get(name, name), "limit": limit, "found": found[name], "at_least": name == "top1", "missed": name in missed}
        for name, limit in report["gates"].items()
    ]


def worst(linears: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Linears by falling output error; those without one by their weights' error, after them."""

    def key(item: tuple[str, Mapping[str, Any]]) -> tuple[int, float]:
        error = item[1].get("error")
        return (0, -error) if error is not None else (1, -(item[1].get("weight_error") or 0.0))

    return sorted(linears.items(), key=key)


def rebuild(folder: Path, output: Path | None) -> Path:
    """Writes the page of an artifact's `report.json` anew: to `output`, or into the artifact, whose manifest follows. Raises UserError."""
    page = report_page(read_report(folder))
    if output is not None:
        write_page(output, page)
        return output
    manifest = read_manifest(folder)
    write_page(folder / PAGE, page)
    if manifest is not None:
        manifest["files"][PAGE] = {"bytes": len(page.encode()), "sha256": file_digest(folder / PAGE)}
        write_json(folder / MANIFEST, manifest)
    return folder / PAGE
