"""The decoder of a checkpoint: by its family's table, or hosted where it has none."""

from __future__ import annotations

import torch

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.decoder.block import Decoder
from quantflow.decoder.native import NativeDecoder


def open_decoder(checkpoint: Checkpoint, length: int, device: torch.device | str) -> Decoder:
    """For windows of `length` tokens."""
    architecture = checkpoint.architecture
    if architecture.library is None:
        return NativeDecoder(architecture, checkpoint.config, length, device)
    from quantflow.decoder.hosted import HostedDecoder

    return HostedDecoder(architecture.library)
