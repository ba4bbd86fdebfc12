"""QuantFlow: offline quantisation and conversion of large language models, and an engine that runs
them. The distribution that it comes in is `quantflow-llm`.

import quantflow

artifact = quantflow.quantize("w4", model="./my-model", output="my-model-w4")
llm = quantflow.LLM(artifact.path)
print(llm.generate("The table", quantflow.SamplingParams(max_tokens=32))[0].text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantflow.errors import (
    DataError,
    FormatError,
    GateError,
    ModelError,
    OutputError,
    Problem,
    QuantFlowError,
    RecipeError,
    RequestError,
    ResourceError,
    ServerError,
    UserError,
)

if TYPE_CHECKING:
    from quantflow.api import export, measure, plan, quantize
    from quantflow.engine.async_llm import AsyncLLM
    from quantflow.engine.llm import LLM
    from quantflow.engine.request import Output, SamplingParams
    from quantflow.evaluate.divergence import Divergence
    from quantflow.pipeline.artifact import Artifact
    from quantflow.pipeline.export import Exported
    from quantflow.pipeline.plan import Plan
    from quantflow.pipeline.progress import Progress

__version__ = "0.1.0"
__all__ = [
    "LLM", "Artifact", "AsyncLLM", "DataError", "Divergence", "Exported", "FormatError",
    "GateError", "ModelError", "Output", "OutputError", "Plan", "Problem", "Progress",
    "QuantFlowError", "RecipeError", "RequestError", "ResourceError", "SamplingParams",
    "ServerError", "UserError", "export", "measure", "plan", "quantize",
]  # fmt: skip

_PLACES = {
    "LLM": "engine.llm", "Artifact": "pipeline.artifact", "AsyncLLM": "engine.async_llm",
    "Divergence": "evaluate.divergence", "Exported": "pipeline.export",
    "Output": "engine.request", "Plan": "pipeline.plan", "Progress": "pipeline.progress",
    "SamplingParams": "engine.request", "export": "api", "measure": "api", "plan": "api",
    "quantize": "api",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """The names that need torch, imported when they are first used: most of QuantFlow's commands
    begin without."""
    if name not in _PLACES:
        raise AttributeError(f"module 'quantflow' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"quantflow.{_PLACES[name]}"), name)
    if _PLACES[name] == "api":
        from quantflow.arguments import for_callers

        value = for_callers(value)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
