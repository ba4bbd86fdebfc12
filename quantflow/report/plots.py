"""The pictures of a report: figures of matplotlib as inline SVG, in the colours of the page they
stand in.

Colours are placeholders while a figure is drawn and the page's CSS variables afterwards, so that
one picture suits light, dark and paper.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, RULE = "#010101", "#020202"
SERIES = tuple(f"#0300{n:02x}" for n in range(8))
VARIABLES = {INK: "var(--ink)", RULE: "var(--rule)"} | {
    colour: f"var(--series-{n})" for n, colour in enumerate(SERIES)
}
MARKERS = "os^DvPX*"  # series differ without colour, too
STYLE = {
    "svg.fonttype": "none",  # letters stay letters: they can be searched, and take the page's font
    "svg.hashsalt": "quantflow",  # the same data, the same bytes
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
}
WIDTH, HEIGHT = 7.2, 2.7  # inches; the page scales them

Points = Mapping[str, Sequence[tuple[float, float]]]
"""Series -> points."""


def drawn(name: str, draw: Callable[[Figure], None], height: float = HEIGHT) -> str:
    """The SVG element of what `draw` puts on a figure. name: tells its ids from those of the page's
    other pictures."""
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(WIDTH, height))
        # Margins by hand: matplotlib's layout engines draw everything twice to find them.
        figure.subplots_adjust(left=0.115, right=0.73, bottom=0.45 / height, top=1 - 0.2 / height)
        draw(figure)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    text = text.replace("'DejaVu Sans', sans-serif", "var(--font)").replace(
        "'DejaVu Sans'", "var(--font)"
    )
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    text = re.sub(
        r' id="([^"]*)"', lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "", text
    )
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    return re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>',
        r'<svg viewBox="\1" role="img" xmlns:xlink="http://www.w3.org/1999/xlink">',
        text,
        count=1,
    )


def lines(
    name: str, series: Points, *, x: str, y: str, log: bool = False, base: float | None = None
) -> str:
    """A line with markers each. log: a logarithmic y axis, from which what is not above 0 is left
    out. base: a level to mark."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for n, (label, points) in enumerate(series.items()):
            shown = [p for p in points if p[1] > 0] if log else list(points)
            style: dict[str, Any] = {
                "color": SERIES[n % len(SERIES)],
                "marker": MARKERS[n % len(MARKERS)] if len(shown) <= 100 else None,
            }
            axes.plot([p[0] for p in shown], [p[1] for p in shown], label=label, **style)
        if log:
            _logarithmic(axes)
        if base is not None:
            axes.axhline(base, color=INK, linewidth=0.8, linestyle="--")
        _finish(axes, x, y, legend=True)

    return drawn(name, draw)


def bars(
    name: str,
    series: Mapping[str, Sequence[float]],
    groups: Sequence[str],
    *,
    y: str,
    x: str = "",
    stacks: Sequence[Sequence[str]] = (),
) -> str:
    """Bars of every series in each group, side by side. stacks: series that stand on each other; by
    default each by itself."""
    piles = stacks or [[label] for label in series]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        width, colours = 0.8 / len(piles), dict(zip(series, itertools.cycle(SERIES)))
        for at, pile in enumerate(piles):
            places, bottom = (
                [i - 0.4 + width * (at + 0.5) for i in range(len(groups))],
                [0.0] * len(groups),
            )
            for label in pile:
                axes.bar(
                    places,
                    series[label],
                    width * 0.92,
                    bottom=bottom,
                    color=colours[label],
                    label=label,
                )
                bottom = [a + b for a, b in zip(bottom, series[label], strict=True)]
        axes.set_xticks(range(len(groups)), groups)
        axes.grid(axis="x", visible=False)
        _finish(axes, x, y, legend=len(series) > 1)

    return drawn(name, draw)


def heat_maps(
    name: str, maps: Mapping[str, Sequence[Sequence[float]]], *, x: str, y: str, label: str
) -> str:
    """Maps side by side: rows upwards, columns to the right."""
    height = min(5.0, 1.8 + 0.05 * max(len(values) for values in maps.values()))

    def draw(figure: Figure) -> None:
        panels: Iterable[Axes] = figure.subplots(1, len(maps), squeeze=False)[0]
        figure.subplots_adjust(left=0.08, right=0.97, top=1 - 0.3 / height, wspace=0.25)
        for axes, (title, values) in zip(panels, maps.items(), strict=True):
            image = axes.imshow(
                values, aspect="auto", origin="lower", interpolation="nearest", cmap="viridis"
            )
            axes.set_title(title, fontsize=9)
            axes.grid(visible=False)
            _finish(axes, x, y, legend=False)
            bar = figure.colorbar(image, ax=axes)
            bar.set_label(label)
            bar.outline.set_visible(False)

    return drawn(name, draw, height)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic y axis, its ticks as plain text: mathematical notation takes longer to set than
    all the rest to draw."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(
        LogLocator(
            subs=(1,)
            if high / low > 300
            else (1, 2, 5)
            if high / low > 10
            else (1, 1.5, 2, 3, 5, 7)
        )
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _finish(axes: Axes, x: str, y: str, *, legend: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(x)
    axes.set_ylabel(y)
    for axis, counted in ((axes.xaxis, x), (axes.yaxis, y)):
        if counted in ("layer", "KV head"):
            axis.set_major_locator(MaxNLocator(integer=True))
    if legend:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, handlelength=1.2)
