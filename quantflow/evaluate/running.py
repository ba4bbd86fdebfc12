"""A model as the engine runs it, for `divergence.compare`: its kernels, its dtype, its KV cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantflow.engine.engine import Engine
from quantflow.evaluate.divergence import Head, Step, Watch


class _EngineHead:
    def __init__(self, engine: Engine) -> None:
        self.vocabulary, self._engine = engine.model_config.vocabulary, engine

    def __call__(self, x: Tensor) -> Tensor:
        return self._engine.runner.logits(x.to(self._engine.ops.dtype)).float().log_softmax(-1)


class Running:
    """make: loads the engine when it is needed, and not before: one model after the other is in
    memory."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._make = make
        self._engine: Engine | None = None

    def states(
        self,
        tokens: Tensor,
        device: torch.device,
        step: Step = lambda share: None,
        watch: Watch = lambda index, x: None,
    ) -> Tensor:
        """What the head reads, `[W, L, H]`, every window a prompt of its own. There are no layers
        to watch."""
        self._engine = engine = self._make()
        found = []
        for window in tokens.tolist():
            found.append(engine.hidden_states(window).float())
            step(engine.model_config.layers / len(tokens))
        return torch.stack(found)

    def head(self, device: torch.device) -> Head:
        """Raises RuntimeError before `states`."""
        if self._engine is None:
            raise RuntimeError("states come before the head")
        engine, self._engine = self._engine, None  # whoever holds the head holds the engine
        return _EngineHead(engine)
