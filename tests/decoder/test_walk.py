"""The walk over a decoder that is a chain of matrices: what is stored, carried, resumed and written
behind the step's back."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor

from quantflow.artifacts.store import Shelf, Store
from quantflow.checkpoints.tensor_file import TensorFile
from quantflow.decoder import walk as module
from quantflow.decoder.stream import Room
from quantflow.decoder.walk import Result, through, walk

LAYERS, SHAPE, CPU = 4, (5, 3, 4), torch.device("cpu")
ROOMS = pytest.mark.parametrize("held", [True, False], ids=["memory", "files"])


def weights(index: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(index)
    return {"m": torch.randn(4, 4, generator=generator)}


def begin() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(99))


class Stop(Exception):
    pass


def run(
    folder: Path,
    held: bool,
    before: Callable[[int], None] = lambda index: None,
    after: Callable[[int], None] = lambda index: None,
) -> list[int]:
    """One walk of two streams, `float` over the matrices and `x` over rounded ones; returns the
    layers that a step was called for. A layer's result is what each stream becomes."""
    shelf = Shelf(Store(folder), "a" * 20)
    room = Room(CPU, None if held else shelf.folder)
    x, full = (room.stream(name, SHAPE, torch.float32) for name in ("x", "float"))
    steps = []

    def step(index: int, stored: dict[str, Tensor]) -> Result:
        steps.append(index)
        before(index)
        # a window at a time, and the last one first: a save that is under way must not see it
        for window in reversed(range(SHAPE[0])):
            x.write(window, x.read(window, window + 1) @ stored["m"].round())
            full.write(window, full.read(window, window + 1) @ stored["m"])
        after(index)
        result = {"x": x.read(0, SHAPE[0]).clone(), "float": full.read(0, SHAPE[0]).clone()}
        return Result(result, {"layer": index})

    def fill() -> None:
        x.write(0, begin())
        full.write(0, begin())

    try:
        walk(weights, LAYERS, CPU, step, shelf, {"x": x, "float": full}, fill)
    finally:
        x.close()
        full.close()
    return steps


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*/*"))}


@ROOMS
def test_what_is_stored_is_the_chain_of_products(tmp_path: Path, held: bool) -> None:
    assert run(tmp_path, held) == [0, 1, 2, 3]
    names = [f"layer-{i:05}.safetensors" for i in range(LAYERS)]
    assert list(contents(tmp_path)) == names  # no stream, no scratch file is left
    rounded = full = begin()
    for index, name in enumerate(names):
        file = TensorFile(tmp_path / ("a" * 20) / name)
        rounded, full = rounded @ weights(index)["m"].round(), full @ weights(index)["m"]
        torch.testing.assert_close(file.read("x"), rounded)
        torch.testing.assert_close(file.read("float"), full)
        assert file.metadata["report"] == f'{{"layer": {index}}}'


@ROOMS
@pytest.mark.parametrize("at", range(LAYERS))
def test_a_walk_that_stops_anywhere_repeats_one_layer(tmp_path: Path, held: bool, at: int) -> None:
    run(tmp_path / "whole", held)
    for moment in ("before", "after"):
        folder = tmp_path / moment

        def stop(index: int) -> None:
            if index == at:
                raise Stop

        with pytest.raises(Stop):
            run(folder, held, **{moment: stop})
        assert run(folder, not held) == list(range(at, LAYERS))
        assert contents(folder) == contents(tmp_path / "whole")


@ROOMS
def test_a_lost_stream_means_starting_over(tmp_path: Path, held: bool) -> None:
    def stop(index: int) -> None:
        if index == 2:
            raise Stop

    run(tmp_path / "whole", held)
    for number, harm in enumerate(("x", "float")):
        folder = tmp_path / harm
        with pytest.raises(Stop):
            run(folder, held, stop)
        streams = sorted(folder.glob("*/stream-*"))
        assert [path.name for path in streams] == ["stream-00001-float.bin", "stream-00001-x.bin"]
        streams[1 - number].write_bytes(bytes(5 * 3 * 4 * 4))
        assert run(folder, held) == [0, 1, 2, 3]
        assert contents(folder) == contents(tmp_path / "whole")


@ROOMS
def test_the_next_layer_begins_while_one_is_written(
    tmp_path: Path, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 0 is not written before layer 1's step has begun, and what is written is what layer 0
    left, though the step goes on meanwhile."""
    run(tmp_path / "whole", held)
    begun, save = Event(), module.save_tensors

    def late(path: Path, *arguments: object) -> None:
        if path.name == "layer-00000.safetensors":
            assert begun.wait(30)
        save(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "save_tensors", late)
    run(tmp_path / "late", held, lambda index: begun.set() if index == 1 else None)
    assert contents(tmp_path / "late") == contents(tmp_path / "whole")


@ROOMS
def test_a_full_disk_ends_the_walk(
    tmp_path: Path, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the first of two streams cannot be saved, the second is not waited for."""

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("quantflow.decoder.stream.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        run(tmp_path / "a", held)
    monkeypatch.undo()
    assert not list((tmp_path / "a").glob("*/layer-*"))
    assert run(tmp_path / "a", held) == [0, 1, 2, 3]


@ROOMS
def test_a_save_that_fails_beside_a_step_that_fails_is_said(
    tmp_path: Path, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = Event()

    def full(*_: object) -> int:
        assert begun.wait(30)
        raise OSError(28, "No space left on device")

    def stop(index: int) -> None:
        if index == 1:
            begun.set()
            raise Stop

    monkeypatch.setattr(module, "save_tensors", full)
    with pytest.raises(Stop) as raised:
        run(tmp_path, held, after=stop)
    (note,) = raised.value.__notes__
    assert "could not be saved" in note and "No space left on device" in note


def test_a_save_that_failed_before_a_step_begins_keeps_it_from_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    steps = []

    def step(index: int, stored: dict[str, Tensor]) -> Result:
        steps.append(index)
        return Result({})

    class Writer(ThreadPoolExecutor):
        """Has done what it was given, before anybody goes on."""

        def submit(self, *arguments: Any, **keywords: Any) -> Any:
            future = super().submit(*arguments, **keywords)
            if arguments[0] is module._save:
                wait([future], 30)
            return future

    monkeypatch.setattr(module, "ThreadPoolExecutor", Writer)
    monkeypatch.setattr(module, "save_tensors", full)
    with pytest.raises(OSError, match="No space") as raised:
        walk(weights, LAYERS, CPU, step, Shelf(Store(tmp_path), "c" * 20), {}, lambda: None)
    assert steps == [0] and not hasattr(raised.value, "__notes__")


def test_the_next_layer_is_read_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AHEAD_BYTES", 0)
    read, begun = [Event() for _ in range(3)], []

    def reading(index: int) -> dict[str, Tensor]:
        read[index].set()
        return weights(index)

    def work(index: int, stored: dict[str, Tensor]) -> None:
        assert torch.equal(stored["m"], weights(index)["m"])
        begun.append(index)
        if index < 2:
            assert read[index + 1].wait(30)
            assert index == 1 or not read[index + 2].is_set()  # and only that one

    through(reading, range(3), CPU, work)
    assert begun == [0, 1, 2]
    through(reading, range(3, 3), CPU, work)


def test_small_layers_are_read_when_they_are_wanted() -> None:
    """A second thread would cost more than it saves."""
    read = list[int]()

    def reading(index: int) -> dict[str, Tensor]:
        read.append(index)
        return weights(index)

    def work(index: int, stored: dict[str, Tensor]) -> None:
        time.sleep(0.05)
        assert read[-1] == index

    through(reading, range(3), CPU, work)
    assert read == [0, 1, 2]


@ROOMS
def test_a_step_may_train(tmp_path: Path, held: bool) -> None:
    """Gradient descent on a matrix, after a step that computed in inference mode."""
    shelf = Shelf(Store(tmp_path), "b" * 20)
    x = Room(CPU, None if held else shelf.folder).stream("x", SHAPE, torch.float32)

    def step(index: int, stored: dict[str, Tensor]) -> Result:
        if index == 0:
            with torch.inference_mode():
                x.write(0, x.read(0, 5) @ stored["m"])
            return Result({})
        target = x.read(0, 5) @ stored["m"]
        trained = torch.zeros(4, 4, requires_grad=True)
        losses = []
        for _ in range(30):
            loss = (x.read(0, 5) @ trained - target).square().mean()
            loss.backward()
            losses.append(float(loss.detach()))
            with torch.no_grad():
                assert trained.grad is not None
                trained -= 0.05 * trained.grad
                trained.grad = None
        x.write(0, x.read(0, 5) @ trained)
        assert losses[-1] < losses[0] / 2
        return Result({"m": trained.detach()})

    walk(weights, 2, CPU, step, shelf, {"x": x}, lambda: x.write(0, begin()))
    x.close()
    assert TensorFile(shelf.layer(1)).read("m").shape == (4, 4)
