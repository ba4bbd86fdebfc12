"""`pack`: the checkpoint that other software loads, written a tensor at a time from the store and
the source.

A format says how a quantised weight is laid out, and into which container (`containers.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from quantflow.artifacts.store import write_json
from quantflow.stages.containers import container_of
from quantflow.stages.pack_job import PackJob
from quantflow.stages.pack_pieces import Results, Step, pieces_of


def write_checkpoint(
    folder: Path, job: PackJob, results: Results, step: Step = lambda _: None
) -> dict[str, float]:
    """Writes weights, config, tokenizer and generation config into `folder` (new), and returns the
    relative error of every tensor that the container made inexact: none, unless the job allows it.
    Raises FormatError for what cannot be held exactly."""
    folder.mkdir(parents=True, exist_ok=True)
    return container_of(job).write(folder, job, results, step)


def write_ranks(
    folder: Path, job: PackJob, results: Results, step: Step = lambda _: None
) -> Iterator[tuple[int, Path]]:
    """Writes the tensor-parallel ranks beside the whole checkpoint in `folder`, and yields each
    with its own folder."""
    for rank in range(rank_folders(job)):
        place = folder / f"tp{job.ranks}" / f"rank-{rank}"
        write_checkpoint(place, replace(job, rank=rank, tp=job.ranks), results, step)
        write_json(place / "tensor_parallel.json", {"rank": rank, "tensor_parallel": job.ranks})
        yield rank, place


def rank_folders(job: PackJob) -> int:
    """How many ranks are written beside the whole: none where there is but one, or the container
    holds them in itself."""
    return job.ranks if job.ranks > 1 and container_of(job).ranks_beside else 0


def written_bytes(job: PackJob) -> int:
    """Of all tensors that the job writes, ranks included: from headers and shapes alone."""
    ranks = rank_folders(job)
    return checkpoint_bytes(job) + (
        ranks * checkpoint_bytes(replace(job, tp=job.ranks)) if ranks else 0
    )


def checkpoint_bytes(job: PackJob) -> int:
    """Of the tensors of the checkpoint alone, which is what is loaded: without ranks beside it."""
    return sum(piece.nbytes for piece in pieces_of(job))
