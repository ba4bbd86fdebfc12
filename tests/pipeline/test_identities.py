"""What changes the identity of which result: a copy of the package's source is edited, and a plan
of one recipe asked again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from quantflow.artifacts import fingerprint
from quantflow.artifacts.fingerprint import closure
from quantflow.calibration.data import Windows
from quantflow.pipeline import identities as module
from quantflow.pipeline.identities import identities
from quantflow.pipeline.plan import Plan, make_plan
from quantflow.stages.base import PlannedStage
from quantflow.stages.registry import STAGES, load_recipe
from tests.helpers.runs import make_bench

PACKAGE = Path(module.__file__).parents[1]
TOKENS, HELD_OUT = Windows([[1]], frozenset(), "a"), Windows([[2]], frozenset(), "b")
Changed = Callable[[], set[str]]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    bench = make_bench(tmp_path_factory.mktemp("identities"))
    stages = ["calibrate", "gptq", "kv_qparams", {"pack": {"format": "awq"}}, bench.evaluate()]
    return make_plan(load_recipe(bench.recipe(stages=stages)), device="cpu")


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for package, top in (("quantflow", PACKAGE), ("quantflow_kernels", fingerprint._kernels())):
        shutil.copytree(top, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def edit(copied: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Appends a comment to a file of the copy that identities are derived from, until the test is
    over."""
    monkeypatch.setattr(fingerprint, "_PACKAGE", copied / "quantflow")
    monkeypatch.setattr(fingerprint, "_kernels", lambda: copied / "quantflow_kernels")
    monkeypatch.setattr(module, "code_digest", fingerprint.code_digest.__wrapped__)
    before: dict[Path, bytes] = {}

    def append(name: str) -> None:
        path = copied / name
        before[path] = path.read_bytes()
        path.write_bytes(before[path] + (b"\n// new" if path.suffix == ".c" else b"\n# new"))

    yield append
    for path, content in before.items():
        path.write_bytes(content)


@pytest.fixture
def changed(plan: Plan) -> Changed:
    """The names of the identities that are others than at the first call."""
    first: dict[str, str] = {}

    def compare() -> set[str]:
        now = asdict(identities(plan, "weights", TOKENS, HELD_OUT))
        first.update({name: value for name, value in now.items() if name not in first})
        return {name for name, value in now.items() if value != first[name]}

    return compare


LAYER_CODE = tuple(
    name
    for kind in STAGES.values()
    if issubclass(kind, PlannedStage) and kind.layer
    for name in kind.modules()
)
ALL = {"calibrate", "sweep", "evaluate", "artifact"}


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("quantflow/quant/product.py", ALL),
        ("quantflow/decoder/native.py", ALL),
        ("quantflow/decoder/walk.py", ALL),
        ("quantflow/pipeline/sweep.py", ALL),
        ("quantflow/checkpoints/tensor_file.py", ALL),
        ("quantflow_kernels/cpu_causal.c", ALL),
        ("quantflow/quant/gptq.py", ALL - {"calibrate"}),
        ("quantflow/calibration/statistics.py", ALL),
        ("quantflow/formats/awq.py", {"evaluate", "artifact"}),
        ("quantflow/stages/pack_writer.py", {"evaluate", "artifact"}),
        ("quantflow/evaluate/distributions.py", {"evaluate", "artifact"}),
        ("quantflow/report/page.py", {"artifact"}),
        ("quantflow/pipeline/run.py", {"artifact"}),
        ("quantflow/tokenizers/load.py", {"evaluate", "artifact"}),  # which copies its files
        ("quantflow/calibration/data.py", set()),  # tokens are in the keys themselves
        ("quantflow/engine/engine.py", set()),  # where `evaluate` does not run it
        # which computes no layer where the family has a table
        ("quantflow/decoder/hosted.py", {"evaluate", "artifact"}),
        ("quantflow/serve/app.py", set()),
    ],
)
def test_a_change_of_a_file(
    edit: Callable[[str], None], changed: Changed, file: str, names: set[str]
) -> None:
    assert changed() == changed() == set()
    edit(file)
    assert changed() == names


def test_a_change_of_any_tokenizer_file_throws_no_layer_away(
    edit: Callable[[str], None], changed: Changed
) -> None:
    changed()
    files = sorted((PACKAGE / "tokenizers").glob("*.py"))
    assert len(files) > 5
    for path in files:
        edit(f"quantflow/tokenizers/{path.name}")
    assert changed() <= {"evaluate", "artifact"}


def test_libraries_and_the_device(
    plan: Plan, changed: Changed, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed()
    with monkeypatch.context() as patch:
        patch.setattr(module, "device_name", lambda device: "another product")
        assert changed() == ALL
    for library, names in (("torch", ALL), ("triton", ALL), ("transformers", set())):
        with monkeypatch.context() as patch:
            patch.setattr(module, "code_digest", fingerprint.code_digest.__wrapped__)
            known = {name: fingerprint._version(name) for name in ("torch", "triton")}
            patch.setattr(fingerprint, "_version", (known | {library: "99"}).__getitem__)
            assert changed() == names, library


def test_a_hosted_decoder_is_of_its_own_code_and_of_transformers(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[tuple[str, ...], tuple[str, ...]]] = []

    def record(*modules: str, libraries: tuple[str, ...] = (), **_: object) -> str:
        seen.append((modules, libraries))
        return ""

    monkeypatch.setattr(module, "code_digest", record)
    library = object()
    architecture = replace(plan.checkpoint.architecture, library=library)  # type: ignore[arg-type]
    checkpoint = type("Hosted", (), {"architecture": architecture})()
    module.computing_code(checkpoint, "quantflow.quant.gptq")
    ((modules, libraries),) = seen
    assert "quantflow.decoder.hosted" in modules and "quantflow.decoder.native" not in modules
    assert libraries == ("torch", "triton", "transformers")


@pytest.mark.parametrize(
    ("file", "modules", "alone"),
    [
        ("pipeline/sweep.py", (*LAYER_CODE, *module.READS, *module.NATIVE), module.LOOP),
        ("pipeline/measure.py", (*module.MEASURES, *module.RUNS), module.MEASUREMENT),
        *(
            (f"pipeline/{name}.py", (*module.WRITES, *module.DESCRIBES), module.ARTIFACT)
            for name in ("run", "packing", "kv_files", "evaluation")
        ),
    ],
)
def test_all_that_a_loop_puts_together_is_seen(
    file: str, modules: tuple[str, ...], alone: tuple[str, ...]
) -> None:
    """What a file whose own imports are left out takes from the folders that compute; settings are
    in the keys as values."""
    text = (PACKAGE / file).read_text()
    folders = "stages|decoder|evaluate|formats|quant|report|engine"
    taken = set(re.findall(rf"from (quantflow\.(?:{folders})\.[\w.]+) import", text))
    settings = {f"quantflow.stages.{p.stem}" for p in _settings()} | {"quantflow.stages.base"}
    assert taken - settings and taken - settings <= set(closure(*modules)) | set(alone)


def _settings() -> list[Path]:
    return [p for p in (PACKAGE / "stages").glob("*.py") if "Stage):" in p.read_text()]
