"""Options that several verbs share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="DIR_OR_ID", help="Model directory or hub id, in place of the recipe's."
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output", metavar="DIR", help="Where the artifact goes, in place of the recipe's."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="dotted.path=value",
        help="Change one value of the recipe; may be repeated.",
    ),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to compute.")]
FieldOption = Annotated[
    str | None,
    typer.Option(
        "--field",
        metavar="NAME",
        help="Field or column of --data that holds the text, if not a usual one.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class Mode(StrEnum):
    exact = "exact"
    fast = "fast"


class KV(StrEnum):
    auto = "auto"
    int8 = "int8"
    dynamic = "dynamic"
    full = "full"


ModelDirectory = Annotated[
    str, typer.Argument(metavar="DIR", help="Artifact, checkpoint or hub id.")
]
ModeOption = Annotated[
    Mode,
    typer.Option(
        "--mode",
        help="exact: the same tokens whatever else runs. fast: last bits depend on the batch.",
    ),
]
KVOption = Annotated[
    KV,
    typer.Option(
        "--kv",
        help=(
            "The KV cache. auto: int8 where the artifact has parameters for it. int8: calibrated,"
            " else dynamic. dynamic: int8, a scale a token and head. full: the model's dtype."
        ),
    ),
]
SessionLength = Annotated[
    int | None,
    typer.Option("--session-len", min=1, help="The longest context; by default the model's."),
]
CacheShare = Annotated[
    float | None,
    typer.Option(
        "--cache-max-entry-count",
        min=0.0,
        max=1.0,
        help="Share of the free memory for the KV cache.",
    ),
]
TensorParallel = Annotated[
    int, typer.Option("--tp", min=1, help="Tensor-parallel ranks, each a process.")
]
DialogueName = Annotated[
    str | None,
    typer.Option(
        "--dialogue", metavar="NAME", help="A dialogue format, in place of the model's own."
    ),
]
Eager = Annotated[
    bool, typer.Option("--eager", help="On a GPU, launch kernels one by one: no CUDA graphs.")
]

Temperature = Annotated[
    float, typer.Option("--temperature", help="0: the likeliest token each time.")
]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p", help="Draw from the likeliest tokens that together have this probability."
    ),
]
TopK = Annotated[int, typer.Option("--top-k", help="Draw from this many tokens; 0: all.")]
RepetitionPenalty = Annotated[
    float, typer.Option("--repetition-penalty", help="More than 1: fewer repetitions.")
]


@dataclass(frozen=True)
class EngineOptions:
    """How a model is run: the options of each verb that runs one, in the order of its help."""

    mode: ModeOption = Mode.exact
    kv: KVOption = KV.auto
    session_len: SessionLength = None
    cache_max_entry_count: CacheShare = None
    tp: TensorParallel = 1
    dialogue: DialogueName = None
    eager: Eager = False
    device: DeviceOption = Device.auto

    @property
    def settings(self) -> dict[str, Any]:
        """As `EngineConfig` calls them."""
        return {
            "mode": self.mode.value,
            "kv": self.kv.value,
            "session_len": self.session_len,
            "cache_max_entry_count": self.cache_max_entry_count,
            "tp": self.tp,
            "dialogue": self.dialogue,
            "graphs": not self.eager,
            "device": self.device.value,
        }

    def followed(self) -> bool:
        """Whether torchrun has started this process to help the first; if so, it has done that."""
        from quantflow.engine.follower import follow
        from quantflow.engine.tensor_parallel import follows
        from quantflow.machine import resolve_device

        if follows():
            follow(resolve_device(self.device.value))
            return True
        return False


USUAL = EngineOptions()


def with_engine_options(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb as typer wants it: an option for each field of its parameter `engine`."""
    own = inspect.signature(verb, eval_str=True)
    options = inspect.signature(EngineOptions, eval_str=True).parameters
    parameters: list[inspect.Parameter] = []
    for parameter in own.parameters.values():
        parameters += options.values() if parameter.name == "engine" else [parameter]

    @wraps(verb)
    def command(**values: Any) -> None:
        verb(engine=EngineOptions(**{name: values.pop(name) for name in options}), **values)

    command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return command
