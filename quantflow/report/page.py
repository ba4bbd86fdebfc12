"""`report.html`: one artifact's report to look at. A single file: nothing is fetched, nothing runs,
it prints, light and dark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from quantflow.artifacts.artifact import PAGE, REPORT
from quantflow.artifacts.store import write_atomic
from quantflow.checkpoints.directory import read_json
from quantflow.errors import ModelError, OutputError, Problem
from quantflow.evaluate.variants import VARIANTS, deployed
from quantflow.paths import absent
from quantflow.report.pictures import largest, pictures
from quantflow.units import size

GATES = {
    "kl_mean": "KL mean",
    "kl_p99": "KL 99th percentile",
    "top1": "top-1",
    "perplexity_ratio": "perplexity ratio",
}
AGAIN = "Run the recipe again: finished layers are taken from the store"
VERSION = 1  # of report.json
WORST, LISTED = 12, 400  # linears shown at once, and in the list that can be opened


def read_report(folder: Path) -> dict[str, Any]:
    """The report of an artifact. Raises ModelError where there is none, or one of an older
    QuantFlow."""
    place = folder / REPORT
    if not place.is_file():
        problem = "no report.json" if folder.is_dir() else absent(folder, "directory")
        raise ModelError(Problem(str(folder), problem, "an artifact of `quantflow run`"))
    report = read_json(place)
    needed = {
        "version": int, "name": str, "asked": dict, "quality": dict, "profile": dict,
        "linears": dict, "activations": dict, "sizes": dict, "memory": list,
    }  # fmt: skip
    wrong = [key for key, kind in needed.items() if not isinstance(report.get(key), kind)]
    if not wrong and report["version"] != VERSION:
        wrong = [f"version {report['version']}"]
    if wrong:
        raise ModelError(
            Problem(
                str(place),
                f"nothing usable under {', '.join(wrong)}",
                "a report of this version of QuantFlow",
                AGAIN,
            )
        )
    return report


def report_page(report: Mapping[str, Any]) -> str:
    """The page of a report, as HTML."""
    return render(
        "report.html",
        title=report["name"],
        r=report,
        final=deployed(report["quality"]),
        recipe=yaml.safe_dump(report["asked"], sort_keys=False, allow_unicode=True, width=100),
        schemes=Counter(
            f"{line['scheme']}, {line['method']}" for line in report["linears"].values()
        ),
        titles=GATES,
        kept=_by_reason(report["kept"]),
        tensors=report.get("tensors"),
        copied=_by_reason(report.get("tensors", {}).get("copied", {})),
        left_out=_by_reason(report.get("tensors", {}).get("left_out", {})),
        variants=VARIANTS,
        pictures=pictures(report),
        memory=report["memory"],
        worst=worst(report["linears"])[:WORST],
        linears=worst(report["linears"])[:LISTED],
    )


def write_page(path: Path, page: str) -> None:
    """Writes a page at once or not at all, in place of another page and of nothing else. Raises
    OutputError."""
    if path.is_dir() or not path.name:
        raise OutputError(
            Problem(str(path), "a directory", "a file for the page, such as report.html")
        )
    if path.exists() and path.suffix != ".html":
        raise OutputError(
            Problem(str(path), "a file that is no page", "a new file, or a page to replace")
        )
    try:
        write_atomic(path, page.encode())
    except OSError as error:
        raise OutputError(
            Problem(str(path), error.strerror or str(error), "a place that can be written")
        ) from error


def render(template: str, **values: Any) -> str:
    """A template of this folder. Every value is escaped but the pictures, which are ours."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size, "number": number, "share": share, "largest": largest}
    return environment.get_template(template).render(**values)


def number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def share(value: float) -> str:
    return f"{value:.2%}"


def _by_reason(kept: Mapping[str, str]) -> dict[str, list[str]]:
    modules: dict[str, list[str]] = {}
    for name, reason in kept.items():
        modules.setdefault(reason, []).append(name)
    return modules


def worst(linears: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Linears by falling output error; those without one by their weights' error, after them."""

    def key(item: tuple[str, Mapping[str, Any]]) -> tuple[int, float]:
        error = item[1].get("error")
        return (0, -error) if error is not None else (1, -(item[1].get("weight_error") or 0.0))

    return sorted(linears.items(), key=key)


def rebuild(folder: Path, output: Path | None) -> Path:
    """Writes the page of an artifact's `report.json` anew: to `output`, or into the artifact.
    Raises UserError."""
    place = output or folder / PAGE
    report = read_report(folder)
    with showing(folder / REPORT):
        page = report_page(report)
    write_page(place, page)
    return place


@contextmanager
def showing(place: Path) -> Iterator[None]:
    """Makes what cannot be shown of a report that somebody changed a ModelError."""
    from jinja2 import UndefinedError

    try:
        yield
    except (
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        ArithmeticError,
        UndefinedError,
    ) as error:
        problem = f"cannot be shown ({type(error).__name__}: {error})"
        raise ModelError(
            Problem(str(place), problem, "a report as `quantflow run` wrote it", AGAIN)
        ) from error
