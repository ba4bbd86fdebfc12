"""The numbers of a TurboMind workspace: its config.ini, written and read, and which of them fit
together."""

from __future__ import annotations

import configparser
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantflow.checkpoints.turbomind.layout import Layout
from quantflow.errors import ModelError, Problem
from quantflow.models.config import MOST_LAYERS, DecoderConfig
from quantflow.placeholder import HEAD_BYTES, placeholder

WEIGHTS = Path("triton_models", "weights")
CONFIG = "config.ini"
KV_INT8 = 4  # quant_policy
MOST_RANKS = 1024
_MOST_CONFIG_BYTES = 1 << 20


def dimension_problems(layout: Layout, share: int) -> list[Problem]:
    """What does not divide. share: of what number a rank's part of an int4 linear must be a
    multiple, where ranks share it."""
    tp, problems = layout.tp, []

    def divide(where: str, size: int, by: int, why: str) -> None:
        if size % by:
            problems.append(Problem(where, f"{size}", f"a multiple of {by} ({why})"))

    divide("head_dim", layout.head_dim, 16 if layout.group_size else 2, "rotary order")
    if tp > 1:
        divide("attention heads", layout.heads, tp, "tp")
        divide("key and value heads", layout.kv_heads, tp, "tp")
        divide("intermediate_size", layout.intermediate, tp, "tp")
    if layout.group_size:
        for linear, (k, m) in layout.fused_shapes().items():
            split_k, split_m = (
                tp > 1 and linear in names for names in (("wo", "w2"), ("w_qkv", "w13"))
            )
            divide(f"{linear} inputs", k, share * tp if split_k else 32, "tiles of the int4 kernel")
            divide(
                f"{linear} outputs", m, share * tp if split_m else 32, "tiles of the int4 kernel"
            )
            divide(
                f"{linear} inputs",
                k,
                layout.group_size * (tp if split_k else 1),
                "whole groups on each rank",
            )
    return problems


def layout_of(config: DecoderConfig, tp: int, group_size: int) -> Layout:
    """The layout of a model's workspace. group_size: 0 for one that is not int4."""
    return Layout(
        hidden=config.hidden,
        intermediate=config.intermediate,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        vocabulary=config.vocabulary,
        # around int4, TurboMind computes in fp16
        dtype="BF16" if config.dtype == "bfloat16" and not group_size else "F16",
        tp=tp,
        group_size=group_size,
        bias=config.attention_bias,
    )


def _token_id(raw_config: Mapping[str, Any], key: str, default: int) -> int:
    value = raw_config.get(key)
    if isinstance(value, list) and value:
        value = value[0]  # config.ini has one; the others stop no generation there
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def ini_values(
    config: DecoderConfig,
    raw_config: Mapping[str, Any],
    layout: Layout,
    model_name: str,
    policy: int,
) -> dict[str, str]:
    """The section `[llama]`. What says how to run, not what to compute, has LMDeploy v0.1's
    defaults."""
    rope = config.rope
    # The first Qwen scales in steps, which config.ini cannot say. Dynamic scaling comes closest: up
    # to the trained length both do nothing.
    factor = {"dynamic": rope.parameters.get("factor", 1.0), "qwen": 1.0}.get(rope.kind, 0.0)
    weight_type = "int4" if layout.group_size else {"F16": "fp16", "BF16": "bf16"}[layout.dtype]
    values: dict[str, object] = {
        "model_name": model_name,
        "tensor_para_size": layout.tp,
        "head_num": config.heads,
        "kv_head_num": config.kv_heads,
        "vocab_size": config.vocabulary,
        "num_layer": config.layers,
        "inter_size": config.intermediate,
        "norm_eps": config.norm_eps,
        "attn_bias": int(layout.bias),
        # Llama's own, where config.json says nothing
        "start_id": _token_id(raw_config, "bos_token_id", 1),
        "end_id": _token_id(raw_config, "eos_token_id", 2),
        "session_len": config.max_positions + 8,
        "weight_type": weight_type,
        "rotary_embedding": config.head_dim,
        "rope_theta": rope.theta,
        "size_per_head": config.head_dim,
        "group_size": layout.group_size,
        "max_batch_size": 64,
        "max_context_token_num": 1,
        "step_length": 1,
        "cache_max_entry_count": 0.5,
        "cache_block_seq_len": 128,
        "cache_chunk_size": 1,
        "use_context_fmha": 1,
        "quant_policy": policy,
        "max_position_embeddings": config.max_positions,
        "rope_scaling_factor": factor,
        "use_logn_attn": int(config.logn_length is not None),
    }
    if config.tied:
        # a key of ours: the head is stored in any case, and a reader would not know
        values["tie_word_embeddings"] = 1
    return {name: str(value) for name, value in values.items()}


def _read_section(path: Path) -> Mapping[str, str]:
    """The section `[llama]` of config.ini; raises ModelError."""
    root = os.path.realpath(path.parents[len(WEIGHTS.parts)])
    if os.path.commonpath((root, os.path.realpath(path))) != root:
        raise ModelError(
            Problem(str(path), f"a link to {os.path.realpath(path)}", "a file inside the workspace")
        )
    parser = configparser.ConfigParser(interpolation=None)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelError(Problem(str(path), "no regular file", "the config.ini of a workspace"))
        with open(path, "rb") as file:
            raw = file.read(_MOST_CONFIG_BYTES + 1)
    except OSError as error:
        raise ModelError(
            Problem(str(path), error.strerror or str(error), "the config.ini of a workspace")
        ) from error
    if len(raw) > _MOST_CONFIG_BYTES:
        raise ModelError(
            Problem(
                str(path), f"more than {_MOST_CONFIG_BYTES} bytes", "the config.ini of a workspace"
            )
        )
    if problem := placeholder(path, raw[:HEAD_BYTES]):
        raise ModelError(problem)
    try:
        parser.read_string(raw.decode("utf-8"), str(path))
    except (configparser.Error, ValueError) as error:  # ValueError: not UTF-8
        text = str(error).replace("\n", " ")[:200]
        raise ModelError(
            Problem(str(path), f"not an INI file ({text})", "a section [llama]")
        ) from error
    if not parser.has_section("llama"):
        raise ModelError(Problem(str(path), "no section [llama]", "the config.ini of a workspace"))
    return parser["llama"]


class _Settings:
    """Typed access to config.ini that collects what is wrong; a wrong value reads as the least that
    is allowed."""

    def __init__(self, path: Path, section: Mapping[str, str]) -> None:
        self._path, self._section = path, section
        self.problems: list[Problem] = []

    def wrong(self, key: str, problem: str, expected: str) -> None:
        self.problems.append(Problem(f"{self._path} {key}", problem[:80], expected))

    def text(self, key: str, default: str | None = None) -> str:
        value = self._section.get(key, default)
        if value is None:
            self.wrong(key, "missing", "a value")
            return ""
        return value.strip().strip('"')  # LMDeploy's documentation shows quoted values

    def integer(self, key: str, least: int, most: int, default: int | None = None) -> int:
        text = self.text(key, None if default is None else str(default))
        if not text and key not in self._section:
            return least
        if not re.fullmatch(r"-?[0-9]{1,18}", text) or not least <= int(text) <= most:
            self.wrong(key, repr(text), f"an integer from {least} to {most}")
            return least
        return int(text)

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        text = self.text(key, None if default is None else str(default))
        if not text and key not in self._section:
            return 1.0
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            self.wrong(key, repr(text), "a number of at least 0" if zero else "a positive number")
            return 1.0
        return value


def read_ini(path: Path) -> tuple[str, Layout, dict[str, Any], bool]:
    """model_name, the layout, the Llama config.json, and whether there are KV scales, from
    config.ini.

    Raises ModelError with everything that is wrong in it.
    """
    # The layout of the files.
    settings = _Settings(path, _read_section(path))
    most = 2**31 - 1
    heads = settings.integer("head_num", 1, most)
    weight_type = settings.text("weight_type")
    if weight_type not in ("fp16", "bf16", "int4"):
        settings.wrong("weight_type", repr(weight_type), "fp16, bf16 or int4")
    int4 = weight_type == "int4"
    head_dim = settings.integer("size_per_head", 2, most)
    layout = Layout(
        hidden=heads * head_dim,
        intermediate=settings.integer("inter_size", 1, most),
        layers=settings.integer("num_layer", 1, MOST_LAYERS),
        heads=heads,
        kv_heads=settings.integer("kv_head_num", 1, most, heads),
        head_dim=head_dim,
        vocabulary=settings.integer("vocab_size", 1, most),
        dtype="BF16" if weight_type == "bf16" else "F16",
        tp=settings.integer("tensor_para_size", 1, MOST_RANKS, 1),
        group_size=settings.integer("group_size", 1, most) if int4 else 0,
        bias=bool(settings.integer("attn_bias", 0, 1, 0)),
    )
    if layout.heads % layout.kv_heads:
        settings.wrong(
            "kv_head_num", f"{layout.kv_heads}", f"a divisor of head_num = {layout.heads}"
        )
    # Settings of which only some values are understood.
    rotary = settings.integer("rotary_embedding", 1, most, head_dim)
    if rotary != head_dim:
        settings.wrong(
            "rotary_embedding", f"{rotary}", f"size_per_head = {head_dim}: whole heads are rotated"
        )
    policy = settings.integer("quant_policy", 0, KV_INT8, 0)
    if policy not in (0, KV_INT8):
        settings.wrong("quant_policy", f"{policy}", f"0, or {KV_INT8} for an int8 KV cache")
    factor = settings.number("rope_scaling_factor", 0.0, zero=True)
    # A key of other versions: there, a factor without it means another kind of scaling, and it
    # alone one that has no factor here.
    if settings.integer("use_dynamic_ntk", 0, 1, int(factor > 0)) != int(factor > 0):
        settings.wrong(
            "use_dynamic_ntk",
            f"it disagrees with rope_scaling_factor = {factor}",
            "dynamic scaling with a factor, or none",
        )
    # The same as a Llama's config.json.
    start, end = settings.integer("start_id", -1, most, 1), settings.integer("end_id", -1, most, 2)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": layout.hidden,
        "intermediate_size": layout.intermediate,
        "num_hidden_layers": layout.layers,
        "num_attention_heads": layout.heads,
        "num_key_value_heads": layout.kv_heads,
        "head_dim": layout.head_dim,
        "vocab_size": layout.vocabulary,
        # 0 is what LMDeploy writes of a model that does not say; 2048 is what config.json without
        # it means.
        "max_position_embeddings": settings.integer("max_position_embeddings", 0, most, 0) or 2048,
        "rms_norm_eps": settings.number("norm_eps"),
        "hidden_act": "silu",
        "rope_theta": settings.number("rope_theta", 10000.0),
        "rope_scaling": {"rope_type": "dynamic", "factor": factor} if factor else None,
        "attention_bias": layout.bias,
        "mlp_bias": False,
        "tie_word_embeddings": bool(settings.integer("tie_word_embeddings", 0, 1, 0)),
        "bos_token_id": None if start < 0 else start,
        "eos_token_id": None if end < 0 else end,
        "torch_dtype": "bfloat16" if layout.dtype == "BF16" else "float16",
    }
    if settings.integer("use_logn_attn", 0, 1, 0):
        config["use_logn_attn"] = True  # no Llama has it: for whoever asks
    if int4:
        config["quantization_config"] = {
            "quant_method": "turbomind",
            "bits": 4,
            "group_size": layout.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": None,
        }
    # Whether the dimensions can be cut and packed.
    if not settings.problems:
        for problem in dimension_problems(layout, 32):  # LMDeploy itself cuts at any tile
            settings.wrong(problem.where, problem.found, problem.expected)
    if settings.problems:
        raise ModelError(settings.problems)
    return settings.text("model_name", ""), layout, config, policy == KV_INT8
