"""QuantFlow: offline quantisation and conversion of large language models, and an engine that runs
them. The distribution that it comes in is `quantflow-llm`.

from quantflow import LLM, SamplingParams

llm = LLM("artifacts/demo_w4_kv8")
print(llm.generate("The table", SamplingParams(max_tokens=32))[0].text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantflow.engine.async_llm import AsyncLLM
    from quantflow.engine.llm import LLM
    from quantflow.engine.request import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "SamplingParams"]

_PLACES = {"LLM": "llm", "AsyncLLM": "async_llm", "SamplingParams": "request"}


def __getattr__(name: str) -> Any:
    """The engine's names, imported when they are first used: it needs torch, and most of
    QuantFlow's commands begin without."""
    if name not in _PLACES:
        raise AttributeError(f"module 'quantflow' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"quantflow.engine.{_PLACES[name]}"), name)
