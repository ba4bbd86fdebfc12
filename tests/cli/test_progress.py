"""What a long run shows: it moves within a layer, its columns have names, and lines break between
words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pytest

import quantflow.cli.console as shown
from quantflow.cli.console import Plain, _Words, progress
from quantflow.pipeline.plan import make_plan
from quantflow.pipeline.run import run
from quantflow.stages.registry import load_recipe
from tests.helpers.runs import blank_pages, invoke, make_bench
from tests.helpers.tiny import write_llama

LINEARS = [f"self_attn.{letter}_proj" for letter in "qkvo"] + [
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
]


class Told:
    """Keeps what it is told: phase -> (total, unit), and its events: ("step", 1.0, detail) or
    ("advance", share, detail)."""

    def __init__(self) -> None:
        self.phases: dict[str, tuple[int, str]] = {}
        self.events: dict[str, list[tuple[str, float, str]]] = {}

    def phase(self, name: str, total: int, unit: str = "steps") -> None:
        self.phases[name] = (total, unit)
        self._events = self.events[name] = []

    def advance(self, share: float, detail: str = "") -> None:
        self._events.append(("advance", share, detail))

    def step(self, detail: str = "") -> None:
        self._events.append(("step", 1.0, detail))

    def note(self, text: str) -> None:
        pass


@pytest.mark.parametrize("method", ["gptq", "rtn", "awq"])
def test_a_layer_moves_as_each_of_its_linears_is_done(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blank_pages(monkeypatch)
    bench, told = make_bench(tmp_path), Told()
    stages = [{"awq": {"grid": 2}}, "rtn"] if method == "awq" else [method]
    stages = ["calibrate", *stages, {"pack": {"format": "compressed-tensors"}}, bench.evaluate()]
    run(make_plan(load_recipe(bench.recipe(stages=stages)), device="cpu"), told)
    assert told.phases == {
        "hash": (1, "files"),
        "calibrate": (2, "layers"),
        "quantise": (2, "layers"),
        "pack": (2, "layers"),
        "evaluate": (4, "layers"),
    }
    events = told.events["quantise"]
    ends = [i for i, (kind, _, _) in enumerate(events) if kind == "step"]
    assert len(ends) == 2 and ends[1] == len(events) - 1
    for layer in (events[: ends[0]], events[ends[0] + 1 : ends[1]]):
        details = [detail for _, _, detail in layer]
        assert sorted(detail for detail in details if detail in LINEARS) == sorted(LINEARS)
        searched = [detail for detail in details if detail.startswith("scales of ")]
        assert len(searched) == (4 if method == "awq" else 0)
        assert sum(share for _, share, _ in layer) == pytest.approx(1)
    assert all(
        detail.startswith("output error")
        for kind, _, detail in events
        if kind == "step" and method != "rtn"
    )
    # two models of two layers
    assert sum(
        share for kind, share, _ in told.events["evaluate"] if kind == "advance"
    ) == pytest.approx(4)
    parts = [share for kind, share, _ in told.events["calibrate"] if kind == "advance"]
    assert sum(parts) == pytest.approx(2) and len(parts) >= 2


@contextmanager
def terminal(
    monkeypatch: pytest.MonkeyPatch, width: int, *, real: bool = True
) -> Iterator[StringIO]:
    written = StringIO()
    console = _Words(
        file=written,
        force_terminal=real,
        width=width,
        highlight=False,
        soft_wrap=True,
        markup=False,
        color_system=None,
    )
    monkeypatch.setattr(shown, "errors", console)
    yield written


def test_a_log_hears_of_tenths_and_of_long_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(shown.time, "monotonic", lambda: clock[0])
    with terminal(monkeypatch, 80, real=False) as written:
        plain = Plain()
        plain.phase("quantise", 40, "layers")
        for layer in range(40):
            for part in range(4):
                clock[0] += 4.0 if layer == 1 else 0.01
                plain.advance(0.25, f"linear {part}")
            plain.step(f"layer {layer}")
    lines = written.getvalue().splitlines()
    assert lines[0] == "quantise: 40 layers"
    assert len(lines) == 1 + 10 + 1  # one within the long layer, and the tenths
    assert re.fullmatch(
        r"quantise: 1\.\d+ of 40 layers, 1\d\.\d s, memory \d+ MiB, linear \d", lines[1]
    )
    assert re.fullmatch(
        r"quantise: 40 of 40 layers, \d+\.\d s, memory \d+ MiB, linear 3", lines[-1]
    )


def test_a_log_of_few_steps_has_a_line_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, 80, real=False) as written:
        plain = Plain()
        plain.phase("hash", 1, "files")
        plain.step("model.safetensors")
        plain.phase("evaluate", 3, "layers")
        for _ in range(30):
            plain.advance(0.1)
    lines = [re.sub(r", \d.*(?= )|, \d.*", "", line) for line in written.getvalue().splitlines()]
    assert lines == [
        "hash: 1 file", "hash: 1 of 1 files model.safetensors", "evaluate: 3 layers",
        *(f"evaluate: {n} of 3 layers MiB" for n in (1, 2, 3)),
    ]  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 120])
def test_bars_have_named_columns_within_the_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with terminal(monkeypatch, width) as written, progress() as bars:
        bars.phase("quantise", 32, "layers")
        bars.advance(0.5, "self_attn.q_proj")
        bars.advance(0.5, "self_attn.o_proj")
        bars.step("output error 1.00e-03")
        bars.advance(0.25, "mlp.down_proj")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())
    last = text.replace("\r", "\n").rstrip("\n").split("\n")[-2:]
    assert last[0].split() == [
        "phase",
        "done",
        "time",
        "left",
        *(["memory"] if width >= 72 else []),
        "at",
    ]
    assert "1/32 layers" in last[1] and last[1].startswith("quantise")
    assert all(len(line) <= width for line in text.replace("\r", "\n").split("\n"))


def test_lines_break_between_words_and_paths_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/a/long/place/" + "x" * 90 + "/report.html"
    text = (
        f"The artifact was written, and what there is to look at lies in {path} where it stays"
        " until it is removed by somebody."
    )
    with terminal(monkeypatch, 60) as written:
        shown.errors.print(text)
    lines = written.getvalue().splitlines()
    assert " ".join(line.rstrip() for line in lines) == text  # no word was cut
    assert all(len(line.rstrip()) <= 60 or path in line for line in lines) and len(lines) > 3
    with terminal(monkeypatch, 60, real=False) as written:
        shown.errors.print(text)
    assert written.getvalue() == f"{text}\n"  # a log's lines are lines


@pytest.mark.parametrize("width", [60, 80])
def test_a_long_path_in_a_table_is_shown_whole(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over lines, where it is wider than the terminal: cut, it would be another path."""
    monkeypatch.setenv("COLUMNS", str(width))
    model = tmp_path / ("long-name-of-a-model-" * 6)
    write_llama(model)
    (tmp_path / "r.yaml").write_text(
        "name: r\nweights: {group_size: 16}\nstages: [rtn, {pack: {format: compressed-tensors}}]\n"
    )
    planned = invoke("plan", tmp_path / "r.yaml", "--model", model, "--output", tmp_path / "out")
    verified = invoke("verify", model, "--device", "cpu")
    for found in (planned, verified):
        assert found.exit_code == 0, found.stderr
        whole = (str(model), "Warning: ")  # lines that the terminal wraps
        wide = [
            line
            for line in found.stdout.splitlines()
            if len(line) > width and not any(part in line for part in whole)
        ]
        assert wide == []
        assert "…" not in found.stdout
    cells = [line.strip("│").partition("│")[2].strip() for line in planned.stdout.splitlines()]
    assert str(model) in "".join(cells)
