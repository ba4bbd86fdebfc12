"""How a model is run: precision, sizes and limits, as the user asked for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch

from quantflow.errors import Problem, UserError
from quantflow.models.config import DecoderConfig


class Mode(StrEnum):
    """exact: the same tokens and log-probabilities whatever the batch, arrival order, chunking,
    prefix hits or preemption. fast: products are computed in the way that is fastest for their
    size, so that last bits depend on what else is in the batch."""

    exact = "exact"
    fast = "fast"


class DType(StrEnum):
    """auto: the checkpoint's; bfloat16 for float16 on a CPU, which has no fast arithmetic for
    it."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class KVPrecision(StrEnum):
    """auto: int8 where the artifact brings calibrated parameters, else full. int8: calibrated where
    they are there, else dynamic.
    dynamic: int8 with a scale for each token and head. full: the model's own dtype."""

    auto = "auto"
    int8 = "int8"
    dynamic = "dynamic"
    full = "full"


@dataclass(frozen=True)
class EngineConfig:
    """How a model is run.

    session_len: the longest context; None: the model's own. max_batch_size: sequences that run at
    once. step_tokens: tokens that go through the model in a step. cache_max_entry_count: the share
    of free memory that the KV cache may take; cache_bytes: its size instead.
    dialogue: a dialogue format by name, in place of the model's own. tp: tensor-parallel ranks.
    graphs: on a GPU, decodes run as CUDA graphs. check: the books of the cache are checked after
    every step.
    """

    mode: Mode = Mode.exact
    device: str = "auto"
    dtype: DType = DType.auto
    kv: KVPrecision = KVPrecision.auto
    session_len: int | None = None
    max_batch_size: int = 64
    step_tokens: int | None = None
    block_size: int = 64
    cache_max_entry_count: float | None = None
    cache_bytes: int | None = None
    prefix_cache: bool = True
    dialogue: str | None = None
    tp: int = 1
    graphs: bool = True
    check: bool = False

    def __post_init__(self) -> None:
        problems = list[Problem]()
        for name, kind in (("mode", Mode), ("dtype", DType), ("kv", KVPrecision)):
            try:  # Python users write strings
                object.__setattr__(self, name, kind(getattr(self, name)))
            except ValueError:
                problems.append(Problem(name, repr(getattr(self, name)), " or ".join(kind)))
        problems += self._of_wrong_kind()
        faulty = {problem.where for problem in problems}
        problems += self._out_of_range(faulty)
        if problems:
            raise UserError(problems)

    def _of_wrong_kind(self) -> Iterator[Problem]:
        optional = ("session_len", "step_tokens", "cache_bytes")
        for name in (*optional, "max_batch_size", "block_size", "tp"):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                yield Problem(name, repr(value), "an integer of at least 1")
        if self.device not in ("auto", "cpu", "cuda"):
            yield Problem("device", repr(self.device), "auto, cpu or cuda")
        for name in ("prefix_cache", "graphs", "check"):
            if not isinstance(getattr(self, name), bool):
                yield Problem(name, repr(getattr(self, name)), "True or False")

    def _out_of_range(self, faulty: set[str]) -> Iterator[Problem]:
        """faulty: fields that are no numbers to compare."""
        size, share = self.block_size, self.cache_max_entry_count
        if "block_size" not in faulty and (size < 16 or size & (size - 1)):
            yield Problem("block_size", str(size), "a power of two, at least 16")
        if share is not None and not (isinstance(share, (int, float)) and 0 < share <= 1):
            expected = "a share of the free memory, more than 0 and at most 1"
            yield Problem("cache_max_entry_count", repr(share), expected)
        if self.step_tokens is None or faulty & {"step_tokens", "max_batch_size"}:
            return
        if self.step_tokens <= self.max_batch_size:
            expected = f"more than max_batch_size, {self.max_batch_size}"
            yield Problem("step_tokens", str(self.step_tokens), expected)

    def dtype_of(self, model: DecoderConfig, device: torch.device) -> torch.dtype:
        """What is computed in."""
        name = str(self.dtype)
        if self.dtype == DType.auto:
            slow = model.dtype == "float16" and device.type == "cpu"
            name = "bfloat16" if slow else model.dtype
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    def context_of(self, model: DecoderConfig) -> int:
        """Tokens of the longest context. Raises UserError for more than the model can take."""
        if self.session_len is None:
            return model.context
        if self.session_len > model.context and not model.stretches:
            expected = f"at most the model's {model.context} positions"
            raise UserError(Problem("session_len", str(self.session_len), expected))
        return self.session_len


SHARE = {"cuda": 0.8, "cpu": 0.25}  # of free memory for the cache
STEP_TOKENS = {"cuda": 2048, "cpu": 512}


def default_step_tokens(device: str, batch: int, block_size: int) -> int:
    """Tokens that go through the model in a step, where `EngineConfig.step_tokens` does not say.
    device: `cuda` or `cpu`."""
    return max(STEP_TOKENS[device], batch + block_size)
