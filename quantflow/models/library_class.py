"""A model class of the transformers library from the values of a config.json: no code of a model
directory, and no weights."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quantflow.models.composite import model_class
from quantflow.models.config import MOST_LAYERS, ConfigProblem
from quantflow.models.spelling import SYNONYMS

# Keys of config.json that name code or how it is run, and none of what the model computes.
NOT_THE_MODEL = re.compile(r"_.*|auto_map|quantization_config|\w+_implementation|use_kernels")


def build(values: Mapping[str, Any]) -> tuple[Any, Any]:
    """The model, its parameters on the meta device, and the config of its language model."""
    plain = _plain(values)
    model_type = plain.pop("model_type")
    for part in (plain, *(value for value in plain.values() if isinstance(value, dict))):
        for name in SYNONYMS[0]:  # before a class makes a list of so many
            if isinstance(count := part.get(name), int) and count > MOST_LAYERS:
                raise ConfigProblem(f"{name} is {count}, expected at most {MOST_LAYERS}")
    logged = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # advice on how to load it, which nobody here does
    try:
        config = CONFIG_MAPPING[model_type].from_dict(plain)
        kind, text = model_class(config), config.get_text_config(decoder=True)
        # torch's own attention caps no scores
        fused = kind._supports_sdpa and not getattr(text, "attn_logit_softcapping", None)
        with _parameters_on_meta():
            model = kind._from_config(
                config,
                dtype=torch.float32,
                attn_implementation="sdpa" if fused else "eager",
                experts_implementation="eager",
            ).eval()
    except ConfigProblem:
        raise
    except Exception as error:  # whatever a class makes of values that it does not expect
        reason = " ".join(str(error).split())[:300]
        raise ConfigProblem(f"transformers' class for {model_type} refuses it: {reason}") from error
    finally:
        transformers.logging.set_verbosity(logged)
    return model, text


def layer_list(model: Any, config: Any, inside: str) -> tuple[str, list[nn.Module]]:
    """Where a model's decoder layers are, and they. config, inside: of its language model. Raises
    ConfigProblem where there are none."""
    counts = [getattr(config, name, None) for name in ("num_hidden_layers", "num_layers")]
    if not isinstance(counts[0], int):
        raise ConfigProblem(
            f"{type(model).__name__} of transformers does not say how many layers it has"
        )
    # What has a config of its own is a tower.
    towers = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(getattr(module, "config", None), transformers.PreTrainedConfig)
        and type(module.config) is not type(config)
        and not inside.startswith(f"{name}.")
        and name
    )
    lists = [
        (name, list(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and name.startswith(inside)
        and not name.startswith(towers)
    ]
    for count in counts:  # some count what a layer has two of
        for name, layers in lists:
            if len(layers) == count:
                return name, layers
    raise ConfigProblem(f"{type(model).__name__} of transformers has no list of {counts[0]} layers")


def _plain(value: Any) -> Any:
    """A value of config.json without what is not the model, and with the numbers that JSON has no
    word for, which transformers writes as `{"__float__": "Infinity"}`."""
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return {
        key: _plain(part) for key, part in value.items() if not NOT_THE_MODEL.fullmatch(str(key))
    }


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters of modules that are made here have a shape and no numbers; buffers have theirs."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        register(module, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        with _LargeOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _LargeOnMeta(TorchFunctionMode):
    """Makes `torch.empty` of a million numbers and more on the meta device: parameters are made so,
    and 256 experts in one of them would not fit any memory before they are registered."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty and options.get("device") is None:
            size = args[0] if args and isinstance(args[0], list | tuple) else args
            if math.prod(size or options.get("size", (0,))) >= 2**20:
                options["device"] = "meta"
        return func(*args, **options)


def move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)
