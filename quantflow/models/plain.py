"""Classes of transformers by torch's own operations.

Some classes call compiled packages where they are installed (causal_conv1d, mamba_ssm,
flash-linear-attention). Those run on GPUs alone, round in their own ways, and cannot all be
differentiated: what the library has in torch beside each is what is computed here.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterable, Iterator

from transformers.integrations import hub_kernels


@contextlib.contextmanager
def plain_functions(modules: Iterable[str]) -> Iterator[None]:
    """While it lasts, these modules call none of them, nor say that one is absent."""
    spaces = [vars(sys.modules[module]) for module in modules]
    dispatching = [
        (space, name, value)
        for space in spaces
        for name, value in space.items()
        if inspect.isfunction(value)
        and hasattr(value, "__wrapped__")
        and value.__globals__ is vars(hub_kernels)
    ]
    for space, name, value in dispatching:
        space[name] = inspect.unwrap(value)
    try:
        yield
    finally:
        for space, name, value in dispatching:
            space[name] = value
