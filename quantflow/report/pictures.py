"""Which pictures a report has, and what each says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from quantflow.evaluate.variants import VARIANTS
from quantflow.report import plots

GIB, MIB = 2**30, 2**20

Points = list[tuple[float, float]]
Series = dict[str, Points]
Report = Mapping[str, Any]
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """svg: the element. caption: what it shows and how to read it."""

    title: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Curves:
    """A picture of lines: where it stands, what it says, and its series from a report; it is left
    out where those are empty."""

    section: str
    title: str
    caption: str
    y: str
    series: Callable[[Report], Series]
    x: str = "layer"
    log: bool = True
    base: float | None = None


def pictures(report: Report) -> dict[str, list[Picture]]:
    """Section -> its pictures, as far as the report has the data."""
    sections: dict[str, list[Picture]] = {
        "quality": [],
        "layers": [],
        "choices": [],
        "ranges": [],
        "kv": [],
        "memory": [],
    }
    for n, curves in enumerate(CURVES):
        if series := {label: points for label, points in curves.series(report).items() if points}:
            svg = plots.lines(
                f"curves-{n}", series, x=curves.x, y=curves.y, log=curves.log, base=curves.base
            )
            sections[curves.section].append(Picture(curves.title, svg, curves.caption))
    if report.get("kv"):
        sections["kv"].append(_kv_picture(report["kv"]))
    if report["memory"]:
        sections["memory"].append(_memory_picture(report["memory"]))
    return sections


def positions(profile: Mapping[str, Any]) -> Points:
    """The middle of each bin of positions, and its KL."""
    width = profile["bin"]
    return [
        (i * width + (width - 1) / 2, value)
        for i, value in enumerate(profile["kl"])
        if value is not None
    ]


def of_layers(profile: Mapping[str, Any]) -> Points:
    return [(i, value) for i, value in enumerate(profile["layers"]) if value is not None]


def by_layer(linears: Mapping[str, Line], value: Callable[[Line], float | None]) -> Series:
    """Leaf name (`down_proj`) -> (layer, mean over its linears of that name, several in a mixture).
    value: None leaves a linear out."""
    numbers: dict[str, dict[int, list[float]]] = {}
    for module, line in linears.items():
        if (number := value(line)) is not None:
            numbers.setdefault(_leaf(module), {}).setdefault(line["layer"], []).append(number)
    return {
        name: [(layer, mean(values)) for layer, values in sorted(layers.items())]
        for name, layers in numbers.items()
    }


def largest(ends: Sequence[float | None] | None) -> float | None:
    """The larger magnitude of a range's ends."""
    return max((abs(end) for end in ends or () if end is not None), default=None)


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _profiles(report: Report, part: Callable[[Mapping[str, Any]], Points]) -> Series:
    return {VARIANTS.get(name, name): part(profile) for name, profile in report["profile"].items()}


def _linears(value: Callable[[Line], float | None]) -> Callable[[Report], Series]:
    return lambda report: by_layer(report["linears"], value)


def _exponents(report: Report) -> Series:
    series: Series = {}
    for line in report["awq"]:
        if line["exponent"] is not None:
            series.setdefault(_leaf(line["group"]), []).append((line["layer"], line["exponent"]))
    return series


def _training(report: Report) -> Series:
    finite = [
        (layer["layer"], [loss for loss in layer["losses"] if loss is not None])
        for layer in report.get("training", [])
    ]
    return {
        "before training": [(index, losses[0]) for index, losses in finite if losses],
        "after": [(index, min(losses)) for index, losses in finite if losses],
    }


def _activations(value: Callable[[Line], float | None]) -> Callable[[Report], Series]:
    return lambda report: by_layer(report["activations"], value)


def _outliers(line: Line) -> float | None:
    return (
        line["absmax"] / line["median_absmax"] if line["absmax"] and line["median_absmax"] else None
    )


CURVES = (
    Curves(
        "quality",
        "KL divergence by position",
        "Mean over the windows. Early tokens have little context to lean on; a rise towards the end"
        " would mean that errors gather in it.",
        "KL, nats",
        lambda report: _profiles(report, positions),
        x="position in the window",
    ),
    Curves(
        "layers",
        "Error of the residual stream after each layer",
        "‖x̂ − x‖² / ‖x‖² against the full-precision model, on held-out text. It gathers over the"
        " layers; a jump names one that suffers.",
        "relative error",
        lambda report: _profiles(report, of_layers),
    ),
    Curves(
        "layers",
        "Normalised output error of each linear",
        "‖(W − Ŵ)X‖² / ‖WX‖² on the calibration text, as each linear was fed when it was"
        " quantised.",
        "relative error",
        _linears(lambda line: line.get("error")),
    ),
    Curves(
        "layers",
        "Error of the weights themselves",
        "‖W − Ŵ‖² / ‖W‖². GPTQ may leave more of it than rounding to nearest does, and less of the"
        " output error above.",
        "relative error",
        _linears(lambda line: line.get("weight_error")),
    ),
    Curves(
        "layers",
        "Training: error of each layer's output",
        "The mean squared difference from the full-precision layer, on windows that were not"
        " trained on.",
        "squared error",
        _training,
    ),
    Curves(
        "choices",
        "AWQ: exponent of the activations",
        "Scales are mean|x| to this power; 0: none. A line is named after the norm that is folded"
        " into, or the linear that is fed.",
        "exponent",
        _exponents,
        log=False,
    ),
    Curves(
        "choices",
        "Share of each group's range that its grid spans",
        "The mean over groups. 1: nothing is clipped. Less: the search found that giving up the"
        " outermost weights serves the rest.",
        "share",
        _linears(lambda line: line.get("clip", {}).get("mean")),
        log=False,
        base=1.0,
    ),
    Curves(
        "ranges",
        "Largest weight",
        "Of each linear as it was quantised: after AWQ's scales, where there are any.",
        "max |w|",
        _linears(lambda line: largest(line.get("weight_range"))),
    ),
    Curves(
        "ranges",
        "Largest activation",
        "Of each linear's input over the calibration text, in full precision.",
        "max |x|",
        _activations(lambda line: line["absmax"]),
    ),
    Curves(
        "ranges",
        "Outlier channels",
        "The largest magnitude of a linear's input over that of its median channel. Large: few"
        " channels carry the range.",
        "ratio",
        _activations(_outliers),
    ),
)


def _kv_picture(kv: Mapping[str, Any]) -> Picture:
    def magnitudes(low: Sequence[float | None], high: Sequence[float | None]) -> list[float]:
        return [largest(ends) or 0.0 for ends in zip(low, high, strict=True)]

    maps = {
        f"{name}s": [
            magnitudes(low, high)
            for low, high in zip(kv[name]["low"], kv[name]["high"], strict=True)
        ]
        for name in ("key", "value")
    }
    svg = plots.heat_maps("kv", maps, x="KV head", y="layer", label="max |·|")
    caption = (
        "The largest magnitude per head that the quantised model produced: what one scale for all"
        " heads of a layer has to span."
    )
    return Picture("Ranges of keys and values", svg, caption)


def _memory_picture(rows: Sequence[Mapping[str, int]]) -> Picture:
    """At the longest context, by batch."""
    context = max(row["context"] for row in rows)
    chosen = [row for row in rows if row["context"] == context]
    unit, divisor = (
        ("GiB", GIB)
        if max(r["weights_before"] + r["kv_before"] for r in chosen) >= GIB
        else ("MiB", MIB)
    )
    names = {
        "weights_before": "weights before",
        "kv_before": "KV cache before",
        "weights_after": "weights after",
        "kv_int8": "KV cache in int8",
    }
    series = {name: [row[key] / divisor for row in chosen] for key, name in names.items()}
    before, after = list(series)[:2], list(series)[2:]
    batches = [str(row["batch"]) for row in chosen]
    svg = plots.bars(
        "memory", series, batches, x="sequences at once", y=unit, stacks=(before, after)
    )
    caption = "Left bars: the original. Right: this artifact with an int8 cache."
    return Picture(f"Weights and KV cache, {context} tokens a sequence", svg, caption)
