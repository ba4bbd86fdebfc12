"""Checkpoint formats: how a quantised model is laid out for other software. A new format is one
file here and one line below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantflow.errors import FormatError, Problem
from quantflow.formats.awq import Awq
from quantflow.formats.base import Format
from quantflow.formats.bitblas import Bitblas
from quantflow.formats.bitsandbytes import Bitsandbytes
from quantflow.formats.compressed_tensors import CompressedTensors
from quantflow.formats.gguf import Gguf
from quantflow.formats.gptq import Gptq, GptqV2, declared_version
from quantflow.formats.huggingface import HuggingFace
from quantflow.formats.turbomind import TurboMind
from quantflow.formats.unread import unread_method

FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        CompressedTensors(),
        Awq(),
        Gptq(),
        GptqV2(),
        Bitblas(),
        Bitsandbytes(),
        TurboMind(),
        Gguf(),
        HuggingFace(),
    )
}


def scale_dtypes(model_dtype: str) -> tuple[str, ...]:
    """Dtypes, as torch names them, in which every scale of a model in `model_dtype` is to be exact:
    those of every format that holds integer codes, so that what is quantised once can be packed
    into each of them."""
    holding = (form for form in FORMATS.values() if form.keeps_codes and "integer" in form.kinds)
    return tuple(dict.fromkeys(form.scale_dtype(model_dtype) for form in holding))


def detect(config: Mapping[str, Any]) -> str | None:
    """The name of the format that a model's `config.json` declares, or None if it declares no
    quantisation.

    Raises FormatError if it declares one that QuantFlow does not read.
    """
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not quantization:
        return None
    if not isinstance(quantization, Mapping):
        raise FormatError(
            Problem("config.json quantization_config", f"{quantization!r}", "a mapping")
        )
    if problem := unread_method("config.json quantization_config", quantization):
        raise FormatError(problem)
    name = str(quantization.get("quant_method"))
    if name == "gptq":
        name = declared_version(quantization)
    if name not in FORMATS or not FORMATS[name].marks:
        readable = ", ".join(known for known, form in FORMATS.items() if form.marks)
        raise FormatError(
            Problem("config.json quantization_config", f"format {name!r}", f"one of {readable}")
        )
    return name


__all__ = ["FORMATS", "Format", "detect", "scale_dtypes"]
