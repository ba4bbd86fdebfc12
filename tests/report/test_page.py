"""`report.json` and the page that is drawn from it: true of the run, self-contained, the same
twice, safe with any text."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from quantflow.artifacts.artifact import foreign_files
from quantflow.formats.reader import Weights
from quantflow.pipeline.report import exponent
from quantflow.report.page import read_report, report_page
from quantflow.report.pictures import by_layer, pictures
from tests.helpers.runs import Bench, contents, invoke, make_bench

ROOT = Path(__file__).parents[2]

STAGES: list[Any] = [
    "calibrate",
    {"awq": {"grid": 4}},
    "rtn",
    "kv_qparams",
    {"pack": {"format": "compressed-tensors"}},
    {"pack": {"format": "huggingface"}},
    {"shard": {"tp": 2}},
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """AWQ and rounding to nearest, of which every part of a report has something to say; a gate
    kept and one missed."""
    bench = make_bench(tmp_path_factory.mktemp("report"))
    gates = {"kl_mean": 10.0, "top1": 1.0}
    recipe = bench.recipe(
        weights={"bits": 3, "group_size": 16, "ignore": ["lm_head", "*.1.self_attn.k_proj"]},
        stages=[*STAGES, bench.evaluate(gates=gates)],
    )
    result = invoke("run", recipe)
    assert result.exit_code == 3, result.stderr
    return bench


@pytest.fixture(scope="module")
def report(bench: Bench) -> dict[str, Any]:
    return read_report(bench.output)


@pytest.fixture(scope="module")
def page(report: dict[str, Any]) -> str:
    return report_page(report)


class Page(HTMLParser):
    """Whether every element that is opened is closed, what is fetched, and the text."""

    VOID = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe", "object", "img")
        found = dict(attrs)
        self.addresses += [
            v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action")
        ]
        self.ids += [v or "" for k, v in attrs if k == "id"]
        assert not any(k.startswith("on") for k in found)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parsed(page: str) -> Page:
    found = Page()
    found.feed(page)
    found.close()
    return found


# The data


def test_every_linear_is_there_and_says_what_is_true_of_it(
    bench: Bench, report: dict[str, Any]
) -> None:
    """RTN after AWQ: dequantised weights and statistics are read back from the artifact."""
    assert len(report["linears"]) == 13
    assert report["kept"] == {
        "model.layers.1.self_attn.k_proj": "weights.ignore",
        "lm_head": "weights.ignore",
    }
    statistics = load_file(bench.output / "calibration.safetensors")
    for module, line in report["linears"].items():
        absmax = statistics[f"{module}.input.absmax"]
        found = report["activations"][module]
        assert found["absmax"] == pytest.approx(float(absmax.max()), rel=1e-3)
        assert found["median_absmax"] == pytest.approx(float(absmax.median()), rel=1e-3)
        assert line["layer"] == int(module.split(".")[2])
        assert 0 < line["error"] < 0.3 and line["tokens"] == 6 * 32
        assert 0.3 < line["clip"]["least"] <= line["clip"]["mean"] <= 1.05
    untouched = {m: line for m, line in report["linears"].items() if m.endswith(("q_proj",))}
    assert untouched
    source, written = (
        load_file(bench.model / "model.safetensors"),
        Weights(bench.output / "compressed-tensors"),
    )
    for module, line in report["linears"].items():
        if all(g["scale"] == "identity" for g in report["awq"] if g["layer"] == line["layer"]):
            weight, found = (
                source[f"{module}.weight"].float(),
                written.tensor(f"{module}.weight").float(),
            )
            assert line["weight_error"] == pytest.approx(
                float((found - weight).square().sum() / weight.square().sum()), rel=2e-2
            )


def test_without_awq_the_weight_error_is_that_of_the_written_weights(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    assert (
        invoke(
            "run", bench.recipe(stages=["rtn", {"pack": {"format": "compressed-tensors"}}])
        ).exit_code
        == 0
    )
    report, written = read_report(bench.output), Weights(bench.output)
    source = load_file(bench.model / "model.safetensors")
    for module, line in report["linears"].items():
        weight, found = (
            source[f"{module}.weight"].float(),
            written.tensor(f"{module}.weight").float(),
        )
        assert line["weight_error"] == pytest.approx(
            float((found - weight).square().sum() / weight.square().sum()), rel=1e-3
        )
        assert line["weight_range"] == pytest.approx(
            [float(weight.min()), float(weight.max())], rel=1e-3
        )
        assert "error" not in line  # no text was read
    assert report["activations"] == {}
    assert (report["quality"], report["evaluation"], report["kv"]) == ({}, None, None)
    assert "no stage" in report_page(report)


def test_what_only_measures_has_a_page_too(tmp_path: Path) -> None:
    """Statistics and KV parameters of weights that stay as they are."""
    bench = make_bench(tmp_path)
    recipe = bench.recipe(
        stages=["calibrate", "kv_qparams", {"pack": {"format": "huggingface"}}, bench.evaluate()]
    )
    content = yaml.safe_load(recipe.read_text())
    del content["weights"]
    recipe.write_text(yaml.safe_dump(content))
    result = invoke("run", recipe)
    assert result.exit_code == 0, result.stderr
    report = read_report(bench.output)
    assert (report["linears"], len(report["activations"]), list(report["quality"])) == (
        {},
        14,
        ["kv"],
    )
    page = report_page(report)
    assert (
        parsed(page).open == []
        and "Largest activation" in page
        and "Ranges of keys and values" in page
    )
    (bench.output / "report.json").write_text(
        json.dumps(report | {"sizes": {}, "evaluation": None, "quality": {}, "profile": {}})
    )
    assert invoke("report", bench.output).exit_code == 0  # of statistics alone


def test_quality_and_its_profile_agree(report: dict[str, Any]) -> None:
    for name, figures in report["quality"].items():
        profile = report["profile"][name]
        assert profile["bin"] == 1 and len(profile["kl"]) == 32 and len(profile["layers"]) == 2
        assert sum(profile["kl"]) / 32 == pytest.approx(figures["kl_mean"], rel=1e-3)
    assert set(report["quality"]) == {"weights", "kv", "weights_and_kv"}


def test_kv_ranges_are_what_the_parameters_span(bench: Bench, report: dict[str, Any]) -> None:
    """One scale a layer spans all heads: (max - min) / 255, the zero point in the middle."""
    parameters = load_file(bench.output / "kv_qparams.safetensors")
    for letter, name in (("k", "key"), ("v", "value")):
        for layer in range(2):
            low, high = (
                min(report["kv"][name]["low"][layer]),
                max(report["kv"][name]["high"][layer]),
            )
            assert float(
                parameters[f"model.layers.{layer}.self_attn.{letter}_scale"]
            ) == pytest.approx((high - low) / 255, rel=1e-2)
            assert len(report["kv"][name]["low"][layer]) == 2  # heads


def test_sizes_and_memory_are_the_files_and_the_caches(
    bench: Bench, report: dict[str, Any]
) -> None:
    """Of the checkpoint that is loaded: the ranks beside it are no part of its size."""
    assert (bench.output / "compressed-tensors" / "tp2" / "rank-1").is_dir()
    for form, bytes_ in report["sizes"].items():
        tensors = load_file(bench.output / form / "model.safetensors")
        assert bytes_ == sum(t.numel() * t.element_size() for t in tensors.values()), form
    # the model knows 128 positions
    row = next(r for r in report["memory"] if (r["batch"], r["context"]) == (8, 128))
    # 2 layers, K and V, 2 heads of 16 channels, 2 bytes each
    assert (
        row["kv_before"] == 8 * 128 * 2 * 2 * 2 * 16 * 2 and row["kv_int8"] * 2 == row["kv_before"]
    )
    assert (
        row["weights_before"] == report["source"]["bytes"]
        and row["weights_after"] == report["sizes"]["compressed-tensors"]
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("identity", 0.0),
        ("a^0.5", 0.5),
        ("a^0.25 w^-0.75", 0.25),
        ("a^0 w^-1", 0.0),
        ("sqrt(a^0.5 w^-0.5)", 0.25),
        ("sqrt(a^1)", 0.5),
        ("identity: no token of the sample reached this expert", 0.0),
        ("something else", None),
    ],
)
def test_exponents(name: str, expected: float | None) -> None:
    assert exponent(name) == expected


# The page


def test_it_is_self_contained_and_well_formed(page: str) -> None:
    found = parsed(page)
    assert found.open == [] and page.startswith("<!doctype html>")
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in found.addresses)
    assert len(found.ids) == len(set(found.ids)) and {
        a[1:] for a in found.addresses if a.startswith("#")
    } <= set(found.ids)
    assert (
        not re.findall(r"https?://(?!www\.w3\.org/)", page)
        and "@import" not in page
        and "url(http" not in page
    )
    assert page.count("<svg") == 11  # nine of lines, the heat maps, memory
    assert "#0300" not in page and "#010101" not in page  # no placeholder of a colour is left
    for said in (
        "What was asked",
        "Provenance",
        "missed",
        "lm_head",
        "KL divergence by position",
        "AWQ: exponent",
        "Ranges of keys",
    ):
        assert said in page


def test_the_same_report_gives_the_same_page(report: dict[str, Any], page: str) -> None:
    assert report_page(copy.deepcopy(report)) == page


def test_gates_are_shown_with_what_was_found(report: dict[str, Any], page: str) -> None:
    found = {gate["name"]: gate for gate in report["gates"]}
    assert (
        found["kl_mean"]["kept"] is True
        and found["top1"]["kept"] is False
        and report["status"] == "failed"
    )
    assert found["top1"]["found"] == report["quality"]["weights_and_kv"]["top1"]
    assert page.count(">missed<") == 1 and page.count(">kept<") == 1


def test_text_is_escaped(report: dict[str, Any]) -> None:
    evil = "<script>alert(1)</script>"
    changed = copy.deepcopy(report) | {"name": evil, "notes": [evil], "fallbacks": {evil: evil}}
    changed["source"]["model"] = evil
    changed["quality"][evil], changed["profile"][evil] = (
        changed["quality"]["kv"],
        changed["profile"]["kv"],
    )
    parsed(report_page(changed))  # which refuses a script


def test_a_report_with_gaps_still_gives_a_page(report: dict[str, Any]) -> None:
    changed = copy.deepcopy(report)
    for line in changed["linears"].values():
        line.update(error=None, weight_error=None, weight_range=[None, None])
        line.pop("clip", None)
    for profile in changed["profile"].values():
        profile.update(layers=[], kl=[None] * 32)
    for line in changed["activations"].values():
        line.update(absmax=0.0, median_absmax=0.0, absmean=None)
    changed["kv"]["key"]["low"][0] = [None, None]
    parsed(report_page(changed))
    assert not {p.title for p in pictures(changed)["layers"]}


def test_experts_are_averaged() -> None:
    lines = {
        f"m.layers.0.mlp.experts.{e}.up_proj": {"layer": 0, "error": float(e)} for e in range(3)
    } | {
        "m.layers.1.mlp.experts.0.up_proj": {"layer": 1, "error": 5.0},
        "m.layers.1.mlp.experts.1.up_proj": {"layer": 1},
    }
    assert by_layer(lines, lambda line: line.get("error")) == {"up_proj": [(0, 1.0), (1, 5.0)]}


# The command


def test_it_is_drawn_anew(bench: Bench, page: str, tmp_path: Path) -> None:
    """Into the artifact, which stays what its manifest says and what a second run finds; or
    elsewhere."""
    folder = tmp_path / "artifact"
    shutil.copytree(bench.output, folder)
    assert (folder / "report.html").read_text() != page  # tests leave it blank
    (folder / "report.html").unlink()
    assert invoke("report", folder).exit_code == 0
    assert (folder / "report.html").read_text() == page
    assert contents(folder, skip=("report.html",)) == contents(bench.output, skip=("report.html",))
    assert foreign_files(folder) == []
    other = tmp_path / "elsewhere.html"
    assert invoke("report", bench.output, "--output", other).exit_code == 0
    assert other.read_text() == page and (bench.output / "report.html").read_text() != page


@pytest.mark.parametrize(
    "change",
    [
        {"linears": {"a": {}}},
        {"linears": {"a": 1}},
        {"memory": [1]},
        {"profile": {"weights": {}}},
        {"kv": {"key": 1}},
        {"sizes": {"awq": "x"}},
        {"quality": {"weights": 1}, "profile": {}},
        {"model": None},
        {"activations": {"a.b": {"layer": "x"}}},
        {"memory": [{"context": 1}]},
    ],
)
def test_a_damaged_report_is_said_to_be_one(
    bench: Bench, report: dict[str, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report | change))
    result = invoke("report", tmp_path)
    assert (
        result.exit_code == 2
        and "report.json" in result.stderr
        and "Run the recipe again" in result.stderr
    )
    result = invoke("compare", bench.output, tmp_path, "--output", tmp_path / "x.html")
    assert result.exit_code in (0, 2)


@pytest.mark.slow
def test_what_the_page_is_depends_on_nothing_of_the_machine(bench: Bench, tmp_path: Path) -> None:
    """The whole command twice, in processes of different homes, time zones, places, and settings of
    matplotlib."""
    pages = []
    for name, rc in (
        ("one", "axes.grid: False\nlines.linewidth: 9\nfont.size: 20\naxes.facecolor: red\n"),
        ("two", ""),
    ):
        home = tmp_path / name
        home.mkdir()
        (home / "matplotlibrc").write_text(rc)
        environment = {
            **os.environ,
            "HOME": str(home),
            "TZ": f"XYZ{len(pages)}",
            "MATPLOTLIBRC": str(home / "matplotlibrc"),
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        }
        command = [
            sys.executable,
            "-m",
            "quantflow.cli.main",
            "run",
            bench.root / "recipe.yaml",
            "--output",
            home / "out",
        ]
        done = subprocess.run(
            command, cwd=home, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 3, done.stderr
        pages.append(contents(home / "out"))
    assert pages[0] == pages[1] and b"<svg" in pages[0]["report.html"]


def test_what_is_no_artifact_is_refused(bench: Bench, tmp_path: Path) -> None:
    for folder, said in ((tmp_path / "none", "no such directory"), (bench.model, "no report.json")):
        result = invoke("report", folder)
        assert result.exit_code == 2 and said in result.stderr
    shutil.copytree(bench.output, tmp_path / "old")
    # of an older version
    (tmp_path / "old" / "report.json").write_text('{"quality": {}, "linears": {}}')
    result = invoke("report", tmp_path / "old")
    assert (
        result.exit_code == 2
        and "nothing usable under version" in result.stderr
        and "Run the recipe again" in result.stderr
    )
    manifest = (bench.output / "quantflow.json").read_bytes()
    for place in (
        tmp_path / "old",
        "",
        bench.output / "quantflow.json",
        bench.output / "compressed-tensors" / "model.safetensors",
    ):
        for command in (("report", bench.output), ("compare", bench.output, bench.output)):
            result = invoke(*command, "--output", place)
            # a file that is no page is not replaced
            assert result.exit_code == 2 and "expected a" in result.stderr, place
    assert (bench.output / "quantflow.json").read_bytes() == manifest
    for version in (2, 999):
        (tmp_path / "old" / "report.json").write_text(
            json.dumps(read_report(bench.output) | {"version": version})
        )
        assert f"version {version}" in invoke("report", tmp_path / "old").stderr


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    arguments = (
        "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
        " --disable-sync".split()
    )
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 500])
def test_the_quality_table_is_seen_whole_on_a_narrow_screen(
    browser: Any, page: str, tmp_path: Path, width: int
) -> None:
    """Every column, top-1 too, without scrolling; and the gates."""
    place = tmp_path / "report.html"
    place.write_text(page)
    tab = browser.new_page(viewport={"width": width, "height": 800})
    tab.goto(place.as_uri())
    tables = tab.evaluate(
        """() => [...document.querySelectorAll('.scroll')].filter(e => e.querySelector('th')).map(
        e => [[...e.querySelectorAll('th')].map(th => th.textContent).join(' ').trim(), e.scrollWidth - e.clientWidth])"""
    )
    over = dict(tables)
    assert over["perplexity KL mean KL p99 top-1"] == 0 and over["gate limit found"] == 0
    tab.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_it_in_light_and_dark(
    browser: Any, page: str, tmp_path: Path, width: int
) -> None:
    """Nothing is fetched, nothing is said on the console, nothing is wider than the window,
    pictures take the page's colours, and no letter of theirs is cut off."""
    place = tmp_path / "report.html"
    place.write_text(page)
    seen: list[str] = []
    inks = []
    for scheme in ("light", "dark"):
        tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        tab.on("request", lambda request: seen.append(request.url))
        tab.on("console", lambda message: seen.append(message.text))
        tab.goto(place.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        inks.append(tab.evaluate("getComputedStyle(document.querySelector('svg text')).fill"))
        cut = tab.evaluate("""() => [...document.querySelectorAll('figure svg')].flatMap(svg => {
            const frame = svg.getBoundingClientRect();
            return [...svg.querySelectorAll('text')].filter(t => {
                const box = t.getBoundingClientRect();
                return box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
            }).map(t => t.textContent);
        })""")
        assert cut == []
        tab.close()
    assert seen == [place.as_uri()] * 2
    assert inks[0] != inks[1]
