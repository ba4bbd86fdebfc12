"""AutoRound's configuration: which layout it names, what single modules have of their own, and what
is refused. What its package writes and reads is in `test_made_elsewhere.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantflow.errors import FormatError
from quantflow.formats import FORMATS
from quantflow.formats.auto_round import translated
from quantflow.formats.reader import Weights
from quantflow.quant.scheme import Scheme
from tests.formats.test_recognise import found, written

CONFIG = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "data_type": "int",
    "autoround_version": "0.5.1",
}


@pytest.mark.parametrize(
    ("packing", "name"),
    [
        ("auto_round:auto_gptq", "gptq"),
        ("auto_round:gptq", "gptq"),
        (None, "gptq"),
        ("auto_round", "gptq_v2"),
        ("auto_round:gptqmodel", "gptq_v2"),
        ("auto_round:auto_awq", "awq"),
        ("auto_round:awq", "awq"),
    ],
)
@pytest.mark.parametrize("method", ["auto-round", "intel/auto-round"])
def test_the_layout(tmp_path: Path, packing: str | None, name: str, method: str) -> None:
    config = {**CONFIG, "quant_method": method, **({"packing_format": packing} if packing else {})}
    assert found(written(tmp_path, name, Scheme(4, 32, True), config)) == name


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq"])
def test_the_wrong_version_is_noticed(tmp_path: Path, name: str) -> None:
    """Symmetric weights have one zero point, so that a packing_format that lies is found out."""
    others = {"gptq": "auto_round", "gptq_v2": "auto_round:auto_gptq", "awq": "auto_round"}
    folder = written(
        tmp_path, name, Scheme(4, 32, True), {**CONFIG, "packing_format": others[name]}, zero=8
    )
    with pytest.raises(FormatError, match=r"q_proj\.q(zeros|weight)"):
        Weights(folder).quantized("model.layers.0.self_attn.q_proj")


EXTRA = {
    "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": None},
    ".*k_proj.*": {"bits": 2, "group_size": 64},
    "k_proj": {"bits": 3},  # a name, which no module has
    "model.layers.1.self_attn.k_proj": {"sym": False},
    "v_proj|o_proj": {"group_size": -1},
    r"layers\.1\.": {"bits": 16, "data_type": "float"},
    "lm_head": {"bits": 8, "act_bits": 16},
}


@pytest.mark.parametrize(
    ("module", "scheme"),
    [
        ("model.layers.0.self_attn.q_proj", Scheme(4, 32, True)),
        ("model.layers.0.mlp.down_proj", Scheme(8, 32, True)),
        ("model.layers.0.self_attn.k_proj", Scheme(2, 64, True)),
        ("model.layers.1.self_attn.k_proj", Scheme(4, 32, False)),  # by name, before any expression
        ("model.layers.0.self_attn.v_proj", Scheme(4, -1, True)),
        # the first expression, anywhere in the name
        ("model.layers.1.self_attn.o_proj", Scheme(4, -1, True)),
        ("model.layers.1.mlp.up_proj", None),
        ("lm_head", Scheme(8, 32, True)),
    ],
)
def test_what_modules_have_of_their_own(module: str, scheme: Scheme | None) -> None:
    config = translated({**CONFIG, "extra_config": EXTRA, "packing_format": "auto_round"})
    assert FORMATS["gptq_v2"].scheme_of(module, config) == scheme


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"packing_format": "auto_round:llm_compressor"},
            r"packing_format: 'auto_round:llm_compressor'; expected one of auto",
        ),
        ({"data_type": "mx_fp", "act_bits": 4}, "data_type 'mx_fp'"),
        ({"data_type": "nv_fp"}, "data_type 'nv_fp'"),
        ({"act_bits": 8}, "activations of 8 bits"),
        ({"data_type": "int_sym_dq", "super_bits": 6}, "int_sym_dq"),
        ({"rotation_config": {"hadamard_type": "hadamard"}}, "activations that are rotated"),
        (
            {"extra_config": {"model.layers.0.mlp.down_proj": {"bits": 8, "data_type": "mx_fp"}}},
            "data_type 'mx_fp'",
        ),
        ({"bits": 5}, r"bits: 5; expected 2, 3, 4 or 8"),
        (
            {"extra_config": {"model.layers.0.mlp.down_proj": {"bits": "8"}}},
            r"down_proj\.bits: '8'",
        ),
        (
            {"extra_config": {"model.layers.0.mlp.down_proj": 8}},
            r"extra_config\.model\.layers\.0\.mlp\.down_proj: 8",
        ),
        ({"extra_config": ["down_proj"]}, "extra_config"),
        ({"extra_config": {"(": {"bits": 8}}}, r"expression"),
    ],
)
def test_what_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = written(tmp_path, "gptq", Scheme(4, 32, True), {**CONFIG, **changes})
    with pytest.raises(FormatError, match=said):
        for module in sorted((weights := Weights(folder)).modules):
            weights.quantized(module)
