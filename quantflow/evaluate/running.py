"""A model as the engine runs it, for `divergence.compare`: its kernels, its dtype, its KV cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantflow.decoder.stream import Room, Stream
from quantflow.engine.engine import Engine
from quantflow.evaluate.distributions import Head
from quantflow.evaluate.divergence import Step, Watch, compared_stream


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
        room: Room,
        name: str = "states",
        step: Step = lambda share: None,
        watch: Watch = lambda index, start, x: None,
    ) -> Stream:
        """What the head reads, `[W, L, H]`, every window a prompt of its own. There are no layers
        to watch."""
        self._engine = engine = self._make()
        x = compared_stream(room, name, (*tokens.shape, engine.model_config.hidden))
        try:
            for number, window in enumerate(tokens.tolist()):
                x.write(number, engine.hidden_states(window).float()[None])
                step(engine.model_config.layers / len(tokens))
        except BaseException:
            x.close()
            raise
        return x

    def head(self, device: torch.device) -> Head:
        """Raises RuntimeError before `states`."""
        if self._engine is None:
            raise RuntimeError("states come before the head")
        engine, self._engine = self._engine, None  # whoever holds the head holds the engine
        return _EngineHead(engine)
