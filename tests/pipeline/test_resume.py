"""A run that is killed, interrupted or out of disk goes on where it stopped, and ends with the
bytes of one that was not."""

from __future__ import annotations

import builtins
import errno
import io
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import STAGES, Bench, Strike, contents, invoke, make_bench, start

ROOT = Path(__file__).parents[2]
FILES = {"QUANTFLOW_ACTIVATION_BYTES": "0"}  # hidden states in files
MEMORY = {"QUANTFLOW_ACTIVATION_BYTES": str(2**30)}
KILLS = 20


@dataclass(frozen=True)
class Whole:
    """A bench, its recipe, and what an uninterrupted run gave: the artifact's bytes, how often it
    touched a file, how long it took."""

    bench: Bench
    recipe: Path
    bytes: dict[str, bytes]
    events: dict[str, int]
    seconds: float

    def check_torn(self, *, published: bool = False) -> dict[str, tuple[int, int]]:
        """After a run that did not end: no output, and only whole layers in the store; returns
        those.

        published: the run may have been killed by the clock between giving the output its name and
        exiting; then it is whole.
        """
        if published and self.bench.output.exists():
            assert contents(self.bench.output) == self.bytes
        else:
            assert not self.bench.output.exists()
        return self.bench.layers()

    def check_finished(self, before: dict[str, tuple[int, int]]) -> None:
        """After the next run: the same bytes, nothing left over, and the layers that were there
        `before` not written again."""
        assert contents(self.bench.output) == self.bytes
        assert self.bench.leavings() == []
        after = self.bench.layers()
        assert {name: after[name] for name in before} == before


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    bench = make_bench(tmp_path_factory.mktemp("resume"), num_hidden_layers=3)
    recipe = bench.recipe(stages=[*STAGES[:5], {"shard": {"tp": 2}}, bench.evaluate()])
    found: list[dict[str, bytes]] = []
    began = 0.0
    # the second one finds the server of processes warm, so its time is the program's own
    for environment in (FILES, MEMORY):
        bench.clear()
        began = time.monotonic()
        process = start(["run", recipe], bench.root, environment=environment)
        process.join()
        assert process.exitcode == 0, (bench.root / "stderr").read_text()
        assert bench.leavings() == []
        found.append(contents(bench.output))
    assert found[0] == found[1], "hidden states in files and in memory must give the same artifact"
    return Whole(
        bench,
        recipe,
        found[0],
        json.loads((bench.root / "events.json").read_text()),
        time.monotonic() - began,
    )


def test_sigkill_at_random_moments(whole: Whole) -> None:
    """Kills follow one another without clearing the store, until a run gets through; then all
    begins again."""
    bench, chance = whole.bench, random.Random(1)
    bench.clear()
    kills, phases, before = 0, set(), dict[str, tuple[int, int]]()
    usual = span = 1.1 * whole.seconds
    while kills < KILLS:
        process = start(
            ["run", whole.recipe], bench.root, environment=chance.choice((FILES, MEMORY))
        )
        process.join(chance.uniform(0, span))
        if process.exitcode is None:
            process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            found = whole.check_torn(published=True)
            assert {name: found[name] for name in before} == before, (
                "finished layers were written again"
            )
            # the machine may have become slower
            span = min(1.1 * span, 5 * usual) if len(found) == len(before) else span
            before = found
            phases.add(len(before))
        else:
            assert process.exitcode == 0, (bench.root / "stderr").read_text()
            whole.check_finished(before)
            bench.clear()
            before, span = {}, usual
    assert len(phases) > 2, f"the kills all hit the same phase: {phases} finished layers"
    assert invoke("run", whole.recipe).exit_code == 0
    whole.check_finished(before)


def _numbers(seed: int, whole_events: int, count: int) -> list[int]:
    """Half of them from the start, where the layers are worked on; packing and its many reads are
    most of the rest."""
    chance = random.Random(seed)
    early = whole_events // 8
    return sorted(
        chance.sample(range(1, early), count // 2)
        + chance.sample(range(early, whole_events), count - count // 2)
    )


def test_sigkill_before_a_file_operation(whole: Whole) -> None:
    bench, sweeps = whole.bench, set()
    for turn, number in enumerate(_numbers(2, whole.events["any"], 10)):
        bench.clear()
        process = start(
            ["run", whole.recipe],
            bench.root,
            environment=(FILES, MEMORY)[turn % 2],
            strike=Strike(signal.SIGKILL, number),
        )
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"operation {number}"
        before = whole.check_torn()
        sweeps.add(len(before))
        assert invoke("run", whole.recipe).exit_code == 0
        whole.check_finished(before)
    assert {0, 6} <= sweeps and len(sweeps) > 2, f"finished layers at the kills: {sweeps}"


@pytest.mark.parametrize("from_last", [0, 1])
def test_sigkill_while_an_artifact_takes_the_place_of_another(whole: Whole, from_last: int) -> None:
    """Two renames end a run: the old artifact away, the new one in. Neither moment leaves a
    mixture."""
    bench = whole.bench
    bench.clear()
    assert invoke("run", whole.recipe, "--set", "seed=1").exit_code == 0
    old, before = contents(bench.output), bench.layers()
    assert old != whole.bytes
    process = start(["run", whole.recipe], bench.root)
    process.join()
    renames = json.loads((bench.root / "events.json").read_text())["os.rename"]
    whole.check_finished(before)

    bench.clear()
    assert invoke("run", whole.recipe, "--set", "seed=1").exit_code == 0
    process = start(
        ["run", whole.recipe],
        bench.root,
        strike=Strike(signal.SIGKILL, renames - from_last, "os.rename"),
    )
    process.join()
    assert process.exitcode == -signal.SIGKILL
    if from_last:
        assert contents(bench.output) == old
    else:
        assert not bench.output.exists()
    before = bench.layers()
    assert invoke("run", whole.recipe).exit_code == 0
    whole.check_finished(before)


def test_sigint_before_a_file_operation(whole: Whole) -> None:
    bench = whole.bench
    for turn, number in enumerate(_numbers(3, whole.events["any"], 4)):
        bench.clear()
        process = start(
            ["run", whole.recipe],
            bench.root,
            environment=(FILES, MEMORY)[turn % 2],
            strike=Strike(signal.SIGINT, number),
        )
        process.join()
        said = (bench.root / "stderr").read_text()
        assert process.exitcode == 130, (number, said)
        assert (
            "quantflow: interrupted" in said
            and "run the same command to go on" in said
            and "Traceback" not in said
        )
        assert [name for name in bench.leavings() if "partial" in name or "tmp" in name] == []
        before = whole.check_torn()
        assert invoke("run", whole.recipe).exit_code == 0
        whole.check_finished(before)


def test_ctrl_c_on_the_command(whole: Whole) -> None:
    """The real command in a process of its own, interrupted after its first layer."""
    bench = whole.bench
    bench.clear()
    command = [sys.executable, "-m", "quantflow.cli.main", "run", str(whole.recipe)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + 180
    while not bench.layers() and time.monotonic() < limit:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=180)
    assert process.returncode == 130, said
    assert "quantflow: interrupted" in said and "Traceback" not in said and out == ""
    before = whole.check_torn()
    assert before
    assert invoke("run", whole.recipe).exit_code == 0
    whole.check_finished(before)


class _Disk:
    """Takes the place of `open`: from the `limit`-th write below `root` on, half of the data and
    then ENOSPC."""

    def __init__(self, root: Path, limit: float) -> None:
        self.root, self.limit, self.writes, self._open = str(root), limit, 0, builtins.open

    def __call__(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        opened = self._open(file, mode, *args, **kwargs)
        if set(mode) & set("wxa+") and str(file).startswith(self.root):
            return _Full(opened, self, str(file))
        return opened


class _Full:
    def __init__(self, file: Any, disk: _Disk, name: str) -> None:
        self._file, self._disk, self._name = file, disk, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Full:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> Any:
        self._disk.writes += 1
        if self._disk.writes >= self._disk.limit:
            self._file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", self._name)
        return self._file.write(data)


@pytest.fixture
def fill(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], _Disk]:
    """Lets the disk be full from the n-th write on."""

    def install(limit: float) -> _Disk:
        monkeypatch.undo()
        disk = _Disk(whole.bench.root / "out", limit)
        monkeypatch.setattr(builtins, "open", disk)
        monkeypatch.setattr(io, "open", disk)
        return disk

    return install


@pytest.mark.parametrize("environment", [FILES, MEMORY], ids=["files", "memory"])
def test_full_disk(
    whole: Whole,
    fill: Callable[[float], _Disk],
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = whole.bench
    bench.clear()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        disk = fill(float("inf"))
        assert invoke("run", whole.recipe).exit_code == 0
        assert contents(bench.output) == whole.bytes
        total, sweeps = disk.writes, set()
        for limit in [1, 2, *_numbers(4, total, 3), total]:
            bench.clear()
            fill(limit)
            result = invoke("run", whole.recipe)
            monkeypatch.undo()
            assert result.exit_code == 4, (limit, result.stderr)
            assert (
                "disk full" in result.stderr
                and "goes on where it stopped" in result.stderr
                and "Traceback" not in result.stderr
            )
            assert [name for name in bench.leavings() if "partial" in name] == []
            before = whole.check_torn()
            sweeps.add(len(before))
            assert invoke("run", whole.recipe).exit_code == 0
            whole.check_finished(before)
        assert {0, 6} <= sweeps, f"finished layers when the disk was full: {sweeps}"


def test_full_disk_leaves_the_artifact_that_was_there(
    whole: Whole, fill: Callable[[float], _Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = whole.bench
    bench.clear()
    assert invoke("run", whole.recipe).exit_code == 0
    fill(8)
    result = invoke("run", whole.recipe, "--set", "stages.evaluate.windows=3")
    monkeypatch.undo()
    assert result.exit_code == 4, result.stderr
    whole.check_finished({})


@pytest.mark.parametrize("harm", ["zeros", "short", "gone"])
def test_a_lost_stream_means_starting_over(whole: Whole, harm: str) -> None:
    """Layers without the hidden states after the last of them are of no use; no harm must come of
    them."""
    bench = whole.bench
    bench.clear()
    # Renames: the hashes; stream, layer, stream, layer, layer of the calibration; stream, layer,
    # stream of the sweep.
    process = start(
        ["run", whole.recipe], bench.root, strike=Strike(signal.SIGKILL, 9, "os.rename")
    )
    process.join()
    assert [Path(name).name for name in bench.layers()].count(
        "layer-00000.safetensors"
    ) == 2 and len(bench.layers()) == 4
    (stream,) = bench.store.glob("*/stream-*.bin")
    size = stream.stat().st_size
    if harm == "gone":
        stream.unlink()
    else:
        stream.write_bytes(bytes(size if harm == "zeros" else size - 64))
    assert invoke("run", whole.recipe).exit_code == 0
    whole.check_finished({})
