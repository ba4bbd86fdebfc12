"""Tensor parallelism (Shoeybi et al. 2019) through torch.distributed: one process a rank, gloo
between CPUs and NCCL between GPUs.

Every rank runs the same engine on its part of the weights and heads, and decides the same:
scheduler and sampler are deterministic. So ranks only need to hear what was asked. The leader, rank
0, tells the others each call as JSON bytes before it makes it itself; sums of activations are all
that else goes between them. Nothing is pickled.

A rank that dies closes its connections: the others' next exchange fails at once, and they end with
a message. Started by the leader (`tp=N`), or all together by torchrun, which sets RANK and
WORLD_SIZE.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from quantflow.errors import Problem, ResourceError, UserError
from quantflow.machine import ending

# how long a rank waits to be told something; a dead leader is noticed at once
IDLE = timedelta(days=7)
START_S = 300
END_S = 5.0


@dataclass(frozen=True)
class Ranks:
    """This process's place in a group. followers: processes that it has started."""

    rank: int
    size: int
    device: torch.device
    followers: tuple[subprocess.Popen[bytes], ...] = ()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor, *, ordered: bool) -> Tensor:
        """The sum of `x` over all ranks, the same bits on each. ordered: taken in the ranks' order,
        where all_reduce's order depends on where in the tensor a number stands (two numbers have
        one order). Raises ResourceError where a rank has gone."""
        try:
            if not ordered or self.size == 2:
                dist.all_reduce(x)
                return x
            parts = [torch.empty_like(x) for _ in range(self.size)]
            dist.all_gather(parts, x.contiguous())
        except RuntimeError as error:
            raise self._lost(error) from error
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        least = torch.tensor([number], device=self.device)
        try:
            dist.all_reduce(least, dist.ReduceOp.MIN)
        except RuntimeError as error:
            raise self._lost(error) from error
        return int(least)

    def tell(self, call: dict[str, Any]) -> None:
        """The leader's: what the others shall do."""
        data = json.dumps(call).encode()
        try:
            dist.broadcast(torch.tensor([len(data)]).to(self.device), 0)
            dist.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device), 0)
        except RuntimeError as error:
            raise self._lost(error) from error

    def hear(self) -> dict[str, Any]:
        """A follower's: what the leader tells."""
        length = torch.zeros(1, dtype=torch.int64, device=self.device)
        try:
            dist.broadcast(length, 0)
            data = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
            dist.broadcast(data, 0)
        except RuntimeError as error:
            raise self._lost(error) from error
        message: dict[str, Any] = json.loads(bytes(data.cpu().tolist()))
        return message

    def _lost(self, error: Exception) -> ResourceError:
        until = time.monotonic() + 2  # its connection closes a moment before it is gone
        while (
            self.followers
            and all(p.poll() is None for p in self.followers)
            and time.monotonic() < until
        ):
            time.sleep(0.02)
        ended = [
            f"rank {i} {ending(p.returncode)}"
            for i, p in enumerate(self.followers, 1)
            if p.poll() is not None
        ]
        reason = "; ".join(ended) or f"an exchange failed ({str(error).splitlines()[0][:200]})"
        return ResourceError(
            Problem(
                f"tensor parallel rank {self.rank} of {self.size}",
                reason,
                "all ranks alive",
                "Start again",
            )
        )

    def end(self) -> None:
        """Leaves the group; the leader tells the others to, and ends those that do not."""
        try:
            if (
                self.leads
                and dist.is_initialized()
                and all(p.poll() is None for p in self.followers)
            ):
                self.tell({"call": "close"})
        except ResourceError:
            pass  # they have gone already
        for process in self.followers:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
        if dist.is_initialized():
            dist.destroy_process_group()


def follows() -> bool:
    """Whether torchrun has started this process as another rank than the first."""
    return int(os.environ.get("RANK", "0")) > 0


def join(tp: int, device: torch.device) -> Ranks:
    """The group of `tp` ranks: torchrun's, or followers started here. Raises UserError where the
    numbers do not fit."""
    started = os.environ.get("WORLD_SIZE")
    if started is not None and int(started) != tp:
        raise UserError(Problem("--tp", str(tp), f"{started}, the ranks that torchrun has started"))
    if device.type == "cuda" and torch.cuda.device_count() < tp:
        raise UserError(
            Problem("--tp", str(tp), f"at most the {torch.cuda.device_count()} GPUs here")
        )
    if started is not None:
        ranks = _enter(int(os.environ["RANK"]), tp, device, ())
        if ranks.leads:
            atexit.register(ranks.end)
        return ranks
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = str(max(1, (os.cpu_count() or 1) // tp))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(tp)}
    environment = {**os.environ, "OMP_NUM_THREADS": threads, **place}
    command = [sys.executable, "-m", "quantflow.engine.follower", device.type]
    followers = tuple(
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(1, tp)
    )
    if device.type == "cpu":
        torch.set_num_threads(int(threads))
    os.environ.update(place)
    try:
        ranks = _enter(0, tp, device, followers)
    except BaseException:
        for process in followers:
            process.kill()
        raise
    finally:
        for name in place:
            os.environ.pop(name, None)
    atexit.register(ranks.end)
    return ranks


def _enter(
    rank: int, tp: int, device: torch.device, followers: tuple[subprocess.Popen[bytes], ...]
) -> Ranks:
    place = torch.device("cuda", rank) if device.type == "cuda" else device
    if device.type == "cuda":
        torch.cuda.set_device(place)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=rank,
            world_size=tp,
            timeout=timedelta(seconds=START_S),
        )
    except (RuntimeError, ValueError) as error:
        raise ResourceError(
            Problem(
                f"tensor parallel rank {rank}",
                f"could not join: {str(error).splitlines()[0][:200]}",
            )
        ) from error
    dist.distributed_c10d._set_pg_timeout(IDLE, dist.group.WORLD)
    return Ranks(rank, tp, place, followers)
