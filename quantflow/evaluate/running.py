"""A model as the engine runs it, for `divergence.compare`: its kernels, its dtype, its KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantflow.engine.engine import Engine
from quantflow.evaluate.divergence import Head, Watch


class _EngineHead:
    def __init__(self, engine: Engine) -> None:
        self.vocabulary, self._engine = engine.model_config.vocabulary, engine

    def __call__(self, x: Tensor) -> Tensor:
        return self._engine.runner.logits(x.to(self._engine.ops.dtype)).float().log_softmax(-1)


class Running:
    """make: loads the engine when it is needed, and not before: one model after the other is in memory."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._make = make
        self._engine: Engine | None = None

    def states(
        self, tokens: Tensor, device: torch.device, step: Callable[[], None] = lambda: None, watch: Watch = lambda index, x: None
    ) -> Tensor:
        """What the head reads, `[W, L, H]`, every window a prompt of its own. There are no layers to watch."""
        self._engine = engine = self._make()
        steps, found = _Steps(engine.model_config.layers, len(tokens), step), []
        for window in tokens.tolist():
            found.append(engine.hidden_states(window).float())
            steps.one()
        return torch.stack(found)

    def head(self, device: torch.device) -> Head:
        """Raises RuntimeError before `states`."""
        if self._engine is None:
            raise RuntimeError("states come before the head")
        engine, self._engine = self._engine, None  # whoever holds the head holds the engine
        return _EngineHead(engine)


@dataclass
class _Steps:
    """As many steps as a model has layers, over its windows."""

    steps: int
    windows: int
    step: Callable[[], None]
    done: int = 0

    def one(self) -> None:
        self.done += 1
        for _ in range(self.done * self.steps // self.windows - (self.done - 1) * self.steps // self.windows):
            self.step()
