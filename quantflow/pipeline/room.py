"""Where a pass may keep its hidden states."""

from __future__ import annotations

from pathlib import Path

import torch

from quantflow.decoder.stream import Room
from quantflow.pipeline.plan import activation_budget


def room(device: str, folder: Path) -> Room:
    """In memory up to the activation budget, on a GPU up to a third of what is free there, and else
    in files of `folder`. Raises UserError."""
    on = torch.device(device)
    free = activation_budget() if on.type == "cpu" else torch.cuda.mem_get_info()[0] // 3
    return Room(on, folder, free)
