"""The walk: streams go through a decoder's blocks, one block at a time.

What every offline pass shares, whatever it does with a layer: the next layer's weights are read
while this one is worked on, streams lie in files where they are larger than their budget, and
results are stored a layer at a time while the next one is computed, so that a walk that was killed
goes on behind the last layer that is whole: what is lost is a layer's work and, of the next one's,
what was done while it was written.

A step decides for itself whether it computes gradients.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantflow.checkpoints.tensor_file import TensorFile, save_tensors
from quantflow.decoder.stream import Snapshot, Stream
from quantflow.machine import give_back_freed_memory

if TYPE_CHECKING:
    from quantflow.artifacts.store import Shelf

# Of a layer's weights, from which on the next one's are read ahead: for less, what a second thread
# does costs the first one more than the reading (evaluation of docs-llama-16m: a tenth).
AHEAD_BYTES = 2**25
# Weights after which freed memory goes back to the system: pages that come again cost time.
GIVEN_BACK_BYTES = 2**26

Read = Callable[[int], Mapping[str, Tensor]]
"""Reads a layer's weights, under their names relative to the layer. Called in another thread."""


@dataclass(frozen=True)
class Result:
    """What a step made of a layer: the tensors to store, and what the report says of it."""

    tensors: dict[str, Tensor]
    report: dict[str, Any] = field(default_factory=dict)


Step = Callable[[int, dict[str, Tensor]], Result]
"""Works on a layer: its index, and its weights on the device. It takes the streams through it."""


def through(
    read: Read, layers: range, device: torch.device, work: Callable[[int, dict[str, Tensor]], None]
) -> None:
    """Calls `work` with each layer's index and its weights on the device; the next layer's are read
    meanwhile."""
    with closing(_each(read, layers, device)) as each:
        for index, weights in each:
            work(index, weights)
            del weights


def _each(
    read: Read, layers: range, device: torch.device
) -> Generator[tuple[int, dict[str, Tensor]], None, None]:
    """Each layer's index and its weights on the device, of which whoever asks for the next
    must have let go: else two layers' take room there."""
    if not layers:
        return
    read_bytes = 0
    with ThreadPoolExecutor(1) as reader:
        ahead: Future[Mapping[str, Tensor]] | None = None
        for index in layers:
            stored = ahead.result() if ahead else read(index)
            weights = {name: tensor.to(device) for name, tensor in stored.items()}
            del stored
            nbytes = sum(tensor.nbytes for tensor in weights.values())
            ahead = None
            if index != layers[-1] and nbytes >= AHEAD_BYTES:
                ahead = reader.submit(read, index + 1)
            read_bytes += nbytes
            yield index, weights
            del weights
            if read_bytes >= GIVEN_BACK_BYTES:
                give_back_freed_memory()
                read_bytes = 0


def walk(
    read: Read,
    layers: int,
    device: torch.device,
    step: Step,
    shelf: Shelf,
    streams: Mapping[str, Stream],
    begin: Callable[[], None],
    tell: Callable[[Result | None], None] = lambda result: None,
) -> None:
    """Fills the shelf with every layer's result, from the first that is missing.

    streams: what is carried from layer to layer, by the names that it is saved under. begin: fills
    them before the first layer. tell: is told of each layer that is done, with None where its
    result was on the shelf.
    """
    shelf.folder.mkdir(parents=True, exist_ok=True)
    done = _resume(shelf, layers, streams)
    if done == 0:
        begin()
    for _ in range(done):
        tell(None)
    ahead = _each(read, range(done, layers), device)
    with ThreadPoolExecutor(1) as writer, closing(ahead) as each:
        saving: Future[None] | None = None
        try:
            for index, weights in each:
                if saving is not None and saving.done():
                    saving.result()  # where it failed at once, nothing more is worked on
                result = step(index, weights)
                # The layer before must be whole on disk before this one is: results count from the
                # first that is missing.
                if saving is not None:
                    saving.result()
                # The last layer's output feeds nothing: a walk killed there redoes no layer.
                carried = streams if index + 1 < layers else {}
                snapshots = {name: stream.snapshot() for name, stream in carried.items()}
                saving = writer.submit(_save, shelf, index, result, snapshots)
                tell(result)
                del result, weights
            if saving is not None:
                saving.result()
        except BaseException as error:
            failed = saving.exception() if saving is not None else None
            if failed is not None and failed is not error:
                error.add_note(f"and a layer's result could not be saved: {failed}")
            raise
    shelf.drop_streams()


def _save(shelf: Shelf, index: int, result: Result, streams: Mapping[str, Snapshot]) -> None:
    try:
        checksums = {name: s.save(shelf.stream(index, name)) for name, s in streams.items()}
    finally:  # where the disk is full, nothing may wait for ever
        for snapshot in streams.values():
            snapshot.release()
    metadata = {
        "report": json.dumps(result.report, sort_keys=True),
        "streams": json.dumps(checksums, sort_keys=True),
    }
    save_tensors(shelf.layer(index), result.tensors, metadata)
    shelf.drop_streams(keep=index)
    result.tensors.clear()  # the next layer needs the room
    give_back_freed_memory()


def _resume(shelf: Shelf, layers: int, streams: Mapping[str, Stream]) -> int:
    """How many layers can be taken as finished; the streams are as the last of them left them."""
    done = shelf.finished(layers)
    if done in (0, layers) or not streams:
        return done
    checksums = json.loads(TensorFile(shelf.layer(done - 1)).metadata.get("streams", "{}"))
    if all(
        name in checksums and stream.load(shelf.stream(done - 1, name), checksums[name])
        for name, stream in streams.items()
    ):
        return done
    # Killed between saving the layer and cleaning up is fine; a stream lost otherwise means
    # starting over.
    for index in reversed(range(layers)):
        shelf.layer(index).unlink(missing_ok=True)
    return 0
