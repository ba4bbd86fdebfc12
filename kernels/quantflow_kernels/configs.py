"""Which tiles the GPU kernels run with, by device: measured where a device has an entry, safe
everywhere else.

`exact`: one regime whatever M is, so that a row's bits never depend on the batch. `fast`: the first
regime that holds M tokens; the last one holds any number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from quantflow_kernels.layout import lane_bits


@dataclass(frozen=True)
class MatmulConfig:
    """Tiles of one regime. block_n: rows of the weight a program; block_m: tokens (at least 16);
    stages: blocks of weights on their way from memory at a time. split: parts that K is summed in,
    at least; programs: K is split until there are as many for one tile of tokens, so that a weight
    of few rows keeps the whole GPU busy. ahead: scales and zero points are loaded a block before
    they are needed, which takes registers."""

    block_n: int
    block_m: int
    split: int = 1
    warps: int = 4
    stages: int = 4
    programs: int = 0
    ahead: bool = False

    def blocks_a_split(self, out_features: int, blocks: int) -> int:
        """Blocks of K in each part of the sum. It depends on the weight alone: so the order of a
        sum does not depend on the batch."""
        tiles = -(-out_features // self.block_n)
        return -(-blocks // max(1, self.split, -(-self.programs // tiles)))

    def for_bits(self, bits: int) -> MatmulConfig:
        """The same for codes of `bits` bits: blocks of narrow ones span more input channels, so
        that activations fill shared memory and registers with fewer of them at a time."""
        if lane_bits(bits) >= 4:
            return self
        return replace(
            self, block_m=min(32, self.block_m), stages=max(2, self.stages // 2), ahead=False
        )


@dataclass(frozen=True)
class AttentionConfig:
    """block_q: rows (queries × the heads that share a KV head) a program, at least 16. tile: keys
    at a time. split: keys that one program of a decode takes, a multiple of `tile`. stages: looking
    up a tile's page takes up some: with 3 or 4 a tile is waited for, from 5 on the next one comes
    meanwhile."""

    block_q: int = 16
    tile: int = 64
    split: int = 128
    warps: int = 4
    stages: int = 5


@dataclass(frozen=True)
class Tuned:
    """exact: the one regime of the exact mode. fast: (most tokens, regime), by rising number.
    dense_from: tokens from which on the fast mode unpacks the weight and calls cuBLAS. attention:
    its tiles."""

    exact: MatmulConfig
    fast: tuple[tuple[int, MatmulConfig], ...]
    dense_from: int
    attention: AttentionConfig


DEFAULT = Tuned(
    exact=MatmulConfig(block_n=64, block_m=16, stages=3, programs=256),
    fast=(
        (16, MatmulConfig(block_n=64, block_m=16, stages=3, programs=256)),
        (32, MatmulConfig(block_n=64, block_m=32)),
        (2**31, MatmulConfig(block_n=64, block_m=64, stages=3)),
    ),
    dense_from=256,
    attention=AttentionConfig(),
)

_HOPPER = replace(DEFAULT.exact, ahead=True)
HOPPER = replace(
    DEFAULT,
    exact=_HOPPER,
    fast=((16, _HOPPER), (32, replace(_HOPPER, block_m=32)), DEFAULT.fast[-1]),
)
"""Read off the compiled code, not measured: on sm_90 the registers suffice."""

DEVICES: dict[str, tuple[int, Tuned]] = {
    "NVIDIA H100 80GB HBM3": (90, HOPPER),
    "NVIDIA H200": (90, HOPPER),
}
"""Name, as `torch.cuda.get_device_name` gives it, -> its compute capability, and what is best
there. `make tune-gpu` measures that."""


def tuned(device: str) -> Tuned:
    """What to run with on a device of that name."""
    return DEVICES[device][1] if device in DEVICES else DEFAULT


def matmul_config(tuning: Tuned, tokens: int, *, exact: bool) -> MatmulConfig:
    """The regime for a product with that many tokens."""
    return tuning.exact if exact else next(config for most, config in tuning.fast if tokens <= most)
