"""A tensor-parallel rank that follows the leader: `python -m quantflow.engine.follower cpu`, in an
environment as torchrun sets it."""

from __future__ import annotations

import os
import signal
import sys

import torch

from quantflow.engine.config import EngineConfig
from quantflow.engine.engine import Engine
from quantflow.engine.request import SamplingParams
from quantflow.engine.tensor_parallel import join
from quantflow.errors import QuantFlowError

CALLS = ("step", "abort", "rewind", "end", "hidden_states")


def follow(device: str) -> None:
    """Joins the group, hears which model to load, and does what it is told until it is told to
    end."""
    ranks = join(int(os.environ["WORLD_SIZE"]), torch.device(device))
    first = ranks.hear()
    engine = Engine(first["model"], EngineConfig(**first["config"]), ranks=ranks)
    while True:
        call = ranks.hear()
        name = call.pop("call")
        if name == "close":
            ranks.end()
            return
        if name == "submit":
            params = call.pop("params")
            params["logit_bias"] = {
                int(token): bias for token, bias in params["logit_bias"].items()
            }
            engine.submit(params=SamplingParams(**params), **call)
        elif name in CALLS:
            getattr(engine, name)(**call)


def main() -> None:
    # a terminal's Ctrl-C is for the leader, which may want to finish what runs
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        follow(sys.argv[1])
    except QuantFlowError as error:
        raise SystemExit(
            "\n".join(
                f"quantflow rank {os.environ.get('RANK')}: {problem}" for problem in error.problems
            )
        ) from error


if __name__ == "__main__":
    main()
