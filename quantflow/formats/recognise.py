"""In which format a checkpoint is: by its config, by the older files beside it, or by its tensors;
refused where that leaves a choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.checkpoints.directory import read_json
from quantflow.errors import FormatError, ModelError, Problem
from quantflow.formats import auto_round, detect
from quantflow.formats.unread import unread_tensors

# Files that AutoGPTQ, AutoAWQ and ModelOpt wrote before config.json took their contents.
_OLDER = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_AWQ_KEYS = {"w_bit": "bits", "q_group_size": "group_size"}  # as the first AutoAWQ called them


def recognise(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]] | None:
    """The format's name and the `quantization_config`, filled in where older writers were silent;
    None for a plain checkpoint.

    Raises FormatError for a format that is not read, and for tensors that more than one could have
    written.
    """
    raw = checkpoint.raw_config
    text = raw.get("text_config")  # where some keep it of a model that is more than that
    declared = raw.get("quantization_config") or raw.get("compression_config")
    if not declared and isinstance(text, Mapping):
        declared = text.get("quantization_config")
    # which MLX writes, and again as a quantization_config without a method
    mlx = raw.get("quantization")
    if isinstance(mlx, Mapping) and "group_size" in mlx and declared in (None, {}, mlx):
        declared = {"quant_method": "mlx", **mlx}
    if not declared:
        for name in _OLDER:
            if (checkpoint.path / name).is_file():
                declared = read_json(checkpoint.path / name)
                break
    if declared is not None and not isinstance(declared, Mapping):
        detect({"quantization_config": declared})  # which says what it should be
    if not declared:
        return _by_tensors(checkpoint)
    if isinstance(declared.get("producer"), Mapping) and isinstance(
        own := declared.get("quantization"), Mapping
    ):
        declared = {"quant_method": declared["producer"].get("name"), **own}  # hf_quant_config.json
    config: dict[str, Any] = {_AWQ_KEYS.get(key, key): value for key, value in declared.items()}
    if "quant_method" not in config:
        method = config.get("method")  # as GPTQModel calls it too
        config["quant_method"] = method or (
            "awq"
            if "version" in config or "w_bit" in declared
            else "gptq"
            if "desc_act" in config
            else None
        )
    if isinstance(config["quant_method"], str):
        config["quant_method"] = config["quant_method"].lower()
    if config["quant_method"] in auto_round.NAMES:
        config = auto_round.translated(config)
    if config["quant_method"] == "awq":
        config.setdefault("zero_point", True)
    if config["quant_method"] == "gptq" and "sym" not in config and _module(checkpoint):
        config["sym"] = (
            _stored_zeros(checkpoint, _module(checkpoint), _gptq_bits(config)) is not None
        )
    if config["quant_method"] == "gptq_v2":
        config |= {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}
    if config["quant_method"] == "gptq":
        if config.get("group_size") is None:
            config["group_size"] = -1  # AutoGPTQ's default
        if config.get("is_marlin_format"):
            hint = "Save it in its plain layout with the tool that made it"
            raise FormatError(
                Problem(
                    str(checkpoint.path),
                    "weights repacked for one kernel (is_marlin_format)",
                    "GPTQ's own layout",
                    hint,
                )
            )
    detected = detect({"quantization_config": config})
    assert detected is not None  # a config that is not empty names a format, or is refused
    return detected, config


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Raises ModelError for a quantised checkpoint, and FormatError for one that is not even
    read."""
    if recognised := recognise(checkpoint):
        raise ModelError(
            Problem(
                str(checkpoint.path),
                f"already quantised ({recognised[0]})",
                "a full-precision checkpoint",
            )
        )


def _by_tensors(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]] | None:
    """AWQ and GPTQ, by the shapes of the first packed weight; every module is taken to be like it,
    which `decode` checks."""
    # A packed weight to look at, of a kind that is read.
    module = _module(checkpoint)
    tensors = checkpoint.container.tensors
    if problem := unread_tensors(
        str(checkpoint.path), {name: info.dtype for name, info in tensors.items()}
    ):
        raise FormatError(problem)
    if module is None:
        strange = sorted(n for n in tensors if n.endswith((".weight_packed", ".weight.absmax")))
        if strange:
            hint = (
                "The config.json of the checkpoint is missing its quantization_config: download it"
                " again"
            )
            raise FormatError(
                Problem(
                    str(checkpoint.path),
                    f"packed tensors such as {strange[0]}, but no quantization_config",
                    hint=hint,
                )
            )
        return None
    n, k = checkpoint.expected.get(f"{module}.weight", (0, 0))
    shape, scales = tensors[f"{module}.qweight"].shape, tensors.get(f"{module}.scales")
    if len(shape) != 2 or scales is None or not scales.shape:
        raise FormatError(
            Problem(
                f"{checkpoint.path} {module}",
                "tensors of neither AWQ nor GPTQ, and no quantization_config",
            )
        )
    # AWQ packs along the rows, GPTQ along the columns.
    rows, columns = shape
    groups = scales.shape[0]
    group_size = k // groups if groups > 1 else -1
    where = f"{checkpoint.path} {module}"
    if (rows, columns * 8) == (k, n) and f"{module}.g_idx" not in tensors:
        return "awq", {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
        }
    bits = rows * 32 // k if k else 0
    if columns != n or bits not in (2, 3, 4, 8):
        raise FormatError(
            Problem(
                f"{where}.qweight",
                f"shape {[rows, columns]}",
                f"AWQ's {[k, n // 8]} or GPTQ's, and no config says which",
            )
        )
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": True,
        "lm_head": "lm_head.qweight" in tensors,
    }
    # Which of GPTQ's two versions, by the zero points of a symmetric grid.
    stored = _stored_zeros(checkpoint, module, bits)
    versions = {2 ** (bits - 1) - 1: "gptq", 2 ** (bits - 1): "gptq_v2"}
    if stored not in versions:
        hint = (
            "Say which in config.json: quantization_config with quant_method, bits, group_size, sym"
            " and checkpoint_format"
        )
        raise FormatError(
            Problem(
                f"{where}.qzeros",
                "zero points of either version of GPTQ, and no config says which",
                hint=hint,
            )
        )
    return versions[stored], {**config, "checkpoint_format": versions[stored]}


def _module(checkpoint: Checkpoint) -> str | None:
    """The first module with a `qweight` that the model has."""
    names = (n.removesuffix(".qweight") for n in checkpoint.source_names if n.endswith(".qweight"))
    return next((name for name in names if f"{name}.weight" in checkpoint.expected), None)


def _gptq_bits(config: Mapping[str, Any]) -> int:
    bits = config.get("bits")
    return bits if bits in (2, 3, 4, 8) else 4


def _stored_zeros(checkpoint: Checkpoint, module: str | None, bits: int) -> int | None:
    """The number in every field of a module's `qzeros`, where it is one and the middle of the range
    in either version; else None."""
    from quantflow.quant.packing import unpack_rows

    name = f"{module}.qzeros"
    info = checkpoint.container.tensors.get(name)
    if info is None or info.dtype != "I32" or len(info.shape) != 2 or info.shape[1] * 32 % bits:
        return None
    zeros = unpack_rows(checkpoint.read_source(name), bits, info.shape[1] * 32 // bits)
    low, high = int(zeros.min()), int(zeros.max())
    return low if low == high and low in (2 ** (bits - 1) - 1, 2 ** (bits - 1)) else None
