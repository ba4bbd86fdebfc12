"""Which tiles a kernel runs with, by device: measured where a device has an entry, safe everywhere else.

`exact`: one regime whatever M is, so that a row's bits never depend on the batch. `fast`: the first regime that holds M tokens; the
last one holds any number.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantflow_kernels import attention, matmul


@dataclass(frozen=True)
class Tuned:
    """exact: the one regime of the exact mode. fast: (most tokens, regime), by rising number. dense_from: tokens from which on the fast
    mode unpacks the weight and calls cuBLAS. attention: its tiles."""

    exact: matmul.Config
    fast: tuple[tuple[int, matmul.Config], ...]
    dense_from: int
    attention: attention.Config


DEFAULT = Tuned(
    exact=matmul.Config(block_n=64, block_m=16),
    fast=(
        (16, matmul.Config(block_n=64, block_m=16)),
        (32, matmul.Config(block_n=64, block_m=32)),
        (2**31, matmul.Config(block_n=64, block_m=64, stages=3)),
    ),
    dense_from=256,
    attention=attention.Config(),
)

DEVICES: dict[str, Tuned] = {}
"""Name, as `torch.cuda.get_device_name` gives it, -> what was measured best there. Not one has been measured yet."""


def tuned(device: str) -> Tuned:
    """What to run with on a device of that name."""
    return DEVICES.get(device, DEFAULT)


def matmul_config(found: Tuned, tokens: int, *, exact: bool) -> matmul.Config:
    """The regime for a product with that many tokens."""
    return found.exact if exact else next(config for most, config in found.fast if tokens <= most)
