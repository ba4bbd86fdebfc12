"""Quantised checkpoints that are recognised and not read: what they are, by what their config says,
or by their tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from quantflow.errors import Problem
from quantflow.formats.compressed_tensors import UNREAD_LAYOUTS

HINT = "Not read yet: use the 16-bit model that it was made from"

# quant_method, in lower case -> what such weights are.
_METHODS = {
    "aqlm": "codes of AQLM's codebooks",
    "bitnet": "BitNet's ternary weights",
    "deepspeedfp": "DeepSpeed's floating-point weights",
    "eetq": "8-bit weights of EETQ",
    "exl2": "weights of ExLlamaV2 (EXL2)",
    "exl3": "weights of ExLlamaV3 (EXL3)",
    "fbgemm_fp8": "FP8 weights with a scale a row",
    "fouroversix": "NVFP4 weights of Four Over Six",
    "fp8": "FP8 weights",
    "fp_quant": "FP-Quant's 4-bit floating-point weights",
    "gemma": "weights of Gemma's own quantisation",
    "higgs": "HIGGS' codes",
    "hqq": "weights of HQQ",
    "marlin": "weights repacked for the Marlin kernel",
    "metal": "weights of Apple's Metal kernels",
    "mlx": "weights of MLX",
    "modelopt": "weights of NVIDIA's ModelOpt",
    "modelopt_fp4": "NVFP4 weights of NVIDIA's ModelOpt",
    "mxfp4": "MXFP4 weights",
    "mxfp8": "MXFP8 weights",
    "nvfp4": "NVFP4 weights",
    "quanto": "weights of Quanto",
    "quark": "weights of AMD's Quark",
    "quip": "weights of QuIP#",
    "sinq": "weights of SINQ",
    "spqr": "weights of SpQR",
    "squeezellm": "codes of SqueezeLLM's tables",
    "torchao": "weights of torchao",
    "vptq": "codes of VPTQ's codebooks",
}
# How names of tensors end that no other kind of checkpoint has, where no config says what it is.
_MARKS = {
    ".weight_scale_inv": "FP8 weights with a scale a block",
    "_proj_blocks": "MXFP4 weights",
    ".SCB": "INT8 weights of bitsandbytes",
    ".q_weight": "weights of ExLlamaV2 (EXL2)",
    ".trellis": "weights of ExLlamaV3 (EXL3)",
    ".W_q": "weights of HQQ",
    ".codebooks": "codes of AQLM's codebooks",
    "._data": "weights of Quanto",
    ".biases": "weights of MLX",
    ".qweight_type": "GGUF weights in safetensors",
}
# the dtype's name up to the underscore
_DTYPES = {"F8": "FP8 weights", "F6": "FP6 weights", "F4": "FP4 weights"}


def unread_method(where: str, config: Mapping[str, Any]) -> Problem | None:
    """What a `quantization_config` says that is known and not read, so that it can be said by name;
    None for anything else."""
    method = str(config.get("quant_method")).lower().replace("-", "_")
    kind, value = _METHODS.get(method, ""), f"quant_method {config.get('quant_method')!r}"
    if method == "fp8" and config.get("weight_block_size"):
        kind += " with a scale a block"
    if method.startswith("modelopt") and (algorithm := config.get("quant_algo")):
        value += f", quant_algo {algorithm!r}"
    if method == "bitsandbytes" and config.get("load_in_8bit"):
        kind, value = "INT8 weights of bitsandbytes", "load_in_8bit"
    if method == "compressed_tensors":
        groups = config.get("config_groups")
        layouts = (
            [group.get("format") for group in groups.values() if isinstance(group, Mapping)]
            if isinstance(groups, Mapping)
            else []
        )
        layout = next(
            (
                str(layout)
                for layout in [*layouts, config.get("format")]
                if str(layout) in UNREAD_LAYOUTS
            ),
            "",
        )
        kind, value = UNREAD_LAYOUTS.get(layout, ""), f"compressed-tensors, format {layout!r}"
    if not kind:
        return None
    return Problem(where, f"{kind} ({value})", "full precision, or a format that is read", HINT)


def unread_tensors(where: str, dtypes: Mapping[str, str]) -> Problem | None:
    """What a checkpoint holds whose config is silent, by its tensors' names and dtypes; None for
    anything else."""
    for mark, kind in _MARKS.items():
        if name := _first(name for name in dtypes if name.endswith(mark)):
            return Problem(
                where, f"{kind} (there is {name})", "full precision, or a format that is read", HINT
            )
    for start, kind in _DTYPES.items():
        narrow = [name for name, dtype in dtypes.items() if dtype.partition("_")[0] == start]
        if narrow:
            problem = (
                f"{kind}: {len(narrow)} of {len(dtypes)} tensors, such as {narrow[0]} of dtype"
                f" {dtypes[narrow[0]]}"
            )
            return Problem(where, problem, "F32, F16 or BF16", HINT)
    return None


def _first(names: Iterable[str]) -> str | None:
    return next(iter(names), None)
