"""Streams in memory and in a file hold the same; a saved one that was torn is refused."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from random import Random
from threading import Event

import pytest
import torch

from quantflow.decoder import stream as module
from quantflow.decoder.stream import Stream
from quantflow.errors import ModelError

SHAPE = (7, 5, 3)
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random(dtype: torch.dtype, seed: int = 0, windows: int = 7) -> torch.Tensor:
    return torch.randn(windows, *SHAPE[1:], generator=torch.Generator().manual_seed(seed)).to(dtype)


def both(tmp_path: Path, dtype: torch.dtype) -> tuple[Stream, Stream]:
    return Stream(SHAPE, dtype, CPU, None), Stream(SHAPE, dtype, CPU, tmp_path / "deep" / "x.bin")


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_and_file_hold_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    expected = random(dtype)
    expected[0, 0, 0], expected[1, 1, 1], expected[2, 2, 2] = float("nan"), float("inf"), -0.0
    bits = expected.view(torch.uint8)
    for stream in both(tmp_path, dtype):
        assert (stream.windows, stream.nbytes) == (7, 7 * 5 * 3 * dtype.itemsize)
        for start, stop in ((5, 7), (0, 2), (2, 5)):
            stream.write(start, expected[start:stop])
        for start, stop in ((0, 7), (3, 4), (6, 7), (1, 6)):
            part = stream.read(start, stop)
            assert part.dtype == dtype and torch.equal(part.view(torch.uint8), bits[start:stop])


@pytest.mark.parametrize("dtype", DTYPES)
def test_writing_over_one_window_leaves_the_others(tmp_path: Path, dtype: torch.dtype) -> None:
    expected, other = random(dtype), random(dtype, seed=1, windows=2)
    for stream in both(tmp_path, dtype):
        stream.write(0, expected)
        stream.write(3, other)
        assert torch.equal(stream.read(3, 5), other)
        assert torch.equal(stream.read(0, 3), expected[:3]) and torch.equal(
            stream.read(5, 7), expected[5:]
        )


def test_views_and_other_strides_can_be_written(tmp_path: Path) -> None:
    value = random(torch.float32).transpose(1, 2).contiguous().transpose(1, 2)
    assert not value.is_contiguous()
    for stream in both(tmp_path, torch.float32):
        stream.write(0, value)
        assert torch.equal(stream.read(0, 7), value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_save_and_load_between_all_kinds(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = random(dtype)
    checksums, contents = set(), set()
    for i, stream in enumerate(both(tmp_path, dtype)):
        stream.write(0, expected)
        for copied in (1, 15 * dtype.itemsize * 3, 2**24):  # one window at a time, three, all
            monkeypatch.setattr(module, "COPIED_BYTES", copied)
            saved = tmp_path / f"saved{i}"
            checksums.add(stream.save(saved))
            contents.add(saved.read_bytes())
            for other in (
                Stream(SHAPE, dtype, CPU, None),
                Stream(SHAPE, dtype, CPU, tmp_path / "other.bin"),
            ):
                assert other.load(saved, next(iter(checksums)))
                assert torch.equal(other.read(0, 7), expected)
                other.close()
        stream.close()
    # however much is copied at once, and whatever the kind of stream
    assert len(checksums) == len(contents) == 1
    assert next(iter(contents)) == expected.view(torch.uint8).numpy().tobytes()
    assert not list(tmp_path.glob(".*"))  # no temporary file is left


def test_torn_and_foreign_files_are_refused(tmp_path: Path) -> None:
    stream = Stream(SHAPE, torch.float32, CPU, None)
    stream.write(0, random(torch.float32))
    saved = tmp_path / "saved"
    checksum = stream.save(saved)
    whole = saved.read_bytes()
    other = Stream(SHAPE, torch.float32, CPU, None)

    def refused(content: bytes, check: int = checksum) -> bool:
        saved.write_bytes(content)
        return not other.load(saved, check)

    assert not refused(whole)
    assert refused(whole[:-1]) and refused(whole + b"\0") and refused(b"")
    assert refused(whole, checksum ^ 1) and refused(whole, -1)
    for at in (0, 100, len(whole) - 1):
        assert refused(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert refused(whole[60:120] + whole[:60] + whole[120:])  # two windows swapped
    assert refused(b"\0" * len(whole))
    saved.unlink()
    assert not other.load(saved, checksum)
    assert not Stream((7, 5, 4), torch.float32, CPU, None).load(saved, checksum)


def test_a_save_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(SHAPE, torch.float32, CPU, None)
    stream.write(0, random(torch.float32))
    saved = tmp_path / "saved"
    checksum = stream.save(saved)
    stream.write(0, random(torch.float32, seed=1))

    def full(file: object, data: memoryview) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(module, "_write_all", full)
        stream.save(saved)
    assert Stream(SHAPE, torch.float32, CPU, None).load(saved, checksum)


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    stream = Stream(SHAPE, torch.float32, CPU, tmp_path / "x.bin")
    stream.write(0, random(torch.float32))
    with open(tmp_path / "x.bin", "r+b") as file:
        file.truncate(100)
    assert stream.read(0, 1).shape == (1, 5, 3)
    with pytest.raises(ModelError, match="ends early"):
        stream.read(1, 2)


def test_close_removes_the_file(tmp_path: Path) -> None:
    for stream in both(tmp_path, torch.float32):
        stream.write(0, random(torch.float32))
        stream.close()
        stream.close()
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_file_stream_is_not_mapped(tmp_path: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc/self/maps on this system")
    path = tmp_path / "not-mapped.bin"
    stream = Stream((4, 64, 64), torch.float32, CPU, path)
    stream.write(0, torch.ones(4, 64, 64))
    part = stream.read(1, 3)
    assert path.name not in maps.read_text() and part.eq(1).all()


@pytest.mark.parametrize("name", [None, "x.bin"], ids=["memory", "file"])
def test_a_snapshot_keeps_what_it_saw_while_the_stream_moves_on(
    tmp_path: Path, name: str | None
) -> None:
    """Three snapshots; between them windows are written once, twice or not at all, and read."""
    stream = Stream(SHAPE, torch.float32, CPU, tmp_path / name if name else None)
    now, chance = random(torch.float32), Random(3)
    stream.write(0, now)
    now = now.clone()
    for turn in range(3):
        snapshot, seen, saved = stream.snapshot(), now.clone(), tmp_path / f"saved-{turn}"
        with ThreadPoolExecutor(1) as writer:
            saving = writer.submit(snapshot.save, saved)
            for _ in range(4):
                start, stop = sorted(chance.sample(range(8), 2))
                assert torch.equal(stream.read(start, stop), now[start:stop])
                now[start:stop] += 1 + turn
                stream.write(start, now[start:stop])
            assert torch.equal(stream.read(0, 7), now)
            checksum = saving.result()
        assert saved.read_bytes() == seen.view(torch.uint8).numpy().tobytes()
        saved.unlink() if turn == 1 else None  # the store has dropped it: the stream has not
        assert torch.equal(stream.read(0, 7), now)
        if turn != 1:
            assert Stream(SHAPE, torch.float32, CPU, None).load(saved, checksum)
    stream.close()
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["saved-0", "saved-2"]


def test_what_is_held_waits_for_its_snapshot_window_by_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save stands still after two windows: these may be written over, the third may not until
    it goes on."""
    monkeypatch.setattr(module, "COPIED_BYTES", 1)  # a window at a time
    stream, go_on, written = Stream(SHAPE, torch.float32, CPU, None), Event(), []
    value = random(torch.float32)
    stream.write(0, value)
    expected = value.view(torch.uint8).numpy().tobytes()
    write_all = module._write_all

    def slow(file: FileIO, data: memoryview) -> None:
        if len(written) == 2:
            assert go_on.wait(30)
        written.append(len(data))
        write_all(file, data)

    monkeypatch.setattr(module, "_write_all", slow)
    snapshot = stream.snapshot()
    with ThreadPoolExecutor(2) as pool:
        saving = pool.submit(snapshot.save, tmp_path / "saved")
        stream.write(0, torch.zeros(2, *SHAPE[1:]))
        third = pool.submit(stream.write, 2, torch.zeros(1, *SHAPE[1:]))
        time.sleep(0.05)
        assert not third.done() and not saving.done()
        go_on.set()
        third.result(30)
    assert (tmp_path / "saved").read_bytes() == expected
    assert stream.read(0, 3).eq(0).all() and torch.equal(stream.read(3, 7), value[3:])


@pytest.mark.parametrize("name", [None, "x.bin"], ids=["memory", "file"])
def test_a_snapshot_that_is_released_holds_nothing_up(tmp_path: Path, name: str | None) -> None:
    stream = Stream(SHAPE, torch.float32, CPU, tmp_path / name if name else None)
    value = random(torch.float32)
    stream.write(0, value)
    stream.snapshot().release()
    stream.write(3, value[:2])
    assert torch.equal(stream.read(0, 7), torch.cat([value[:3], value[:2], value[5:]]))
    stream.close()
    assert not list(tmp_path.iterdir())


def test_a_file_becomes_the_saved_one_without_a_copy(tmp_path: Path) -> None:
    stream = Stream(SHAPE, torch.float32, CPU, tmp_path / "x.bin")
    stream.write(0, random(torch.float32))
    number = (tmp_path / "x.bin").stat().st_ino
    stream.save(tmp_path / "saved")
    assert (tmp_path / "saved").stat().st_ino == number
    stream.close()


def test_a_step_may_train_on_what_another_computed_in_inference_mode(tmp_path: Path) -> None:
    for stream in both(tmp_path, torch.float32):
        with torch.inference_mode():
            stream.write(0, torch.ones(7, 5, 3) * 2)
        weight = torch.ones(3, requires_grad=True)
        (stream.read(0, 7) * weight).sum().backward()
        assert weight.grad is not None and weight.grad.tolist() == [70.0] * 3
        stream.write(0, stream.read(0, 7) * weight)  # a result that has a history
        assert not stream.read(0, 7).requires_grad
