"""The published JSON schema and the recipes under recipes/: the schema accepts what the loader
accepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from quantflow.recipe import dump, json_schema, read_recipe
from quantflow.recipe.values import parse_bytes
from quantflow.stages.awq import Awq
from quantflow.stages.pack import Pack
from quantflow.stages.registry import STAGES, load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
VALIDATOR = Draft202012Validator(json_schema(STAGES))


def errors(data: Any) -> list[str]:
    return [error.json_path for error in VALIDATOR.iter_errors(data)]


def recipe(**changes: Any) -> dict[str, Any]:
    data = {
        "name": "x",
        "calibration": {"data": "c4"},
        "stages": ["calibrate", {"gptq": None}, {"pack": {"format": "gptq"}}],
    }
    return {**data, **changes}


def test_every_promised_recipe_is_there() -> None:
    assert {path.stem for path in RECIPES} == {
        "auto_awq",
        "calibrate",
        "demo_gguf",
        "demo_w4_kv8",
        "deepseek_v3_w4",
        "gemma3_w4",
        "gemma4_w4",
        "glm4_5_w4",
        "gpt_oss_w4",
        "granite_w4",
        "internlm3_w4",
        "phi4_w4",
        "qwen3_5_w4",
        "internlm20b_w4_kv8",
        "internlm2_w4_kv8",
        "internlm7b_w4_kv8",
        "kv_qparams",
        "llama2_nf4",
        "llama2_w4",
        "mistral_w4",
        "mixtral_w4",
        "opt-125m_w4",
        "qwen2_gguf",
        "qwen2_w4",
        "qwen3_w4",
        "qwen_w4",
        "smollm2_w4",
        "vicuna_w4",
        "w4",
    }


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_recipe_loads_and_fits_the_schema(path: Path) -> None:
    loaded = load_recipe(path)
    assert loaded.name == path.stem
    assert loaded.output == f"artifacts/{path.stem}"
    assert loaded.model or path.stem == "w4"  # which is for any
    assert errors(yaml.safe_load(path.read_text(encoding="utf-8"))) == []
    assert errors(dump(loaded)) == []
    assert read_recipe(dump(loaded), STAGES) == loaded


def test_the_demo_recipe_is_the_one_of_the_documentation() -> None:
    path = next(path for path in RECIPES if path.stem == "demo_w4_kv8")
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert data == {
        "name": "demo_w4_kv8",
        "model": "calib_data/demo_model",
        "calibration": {"data": "calib_data/demo_calib.txt", "samples": 128, "seqlen": 512},
        "weights": {"bits": 4, "group_size": 128, "symmetric": False, "ignore": ["lm_head"]},
        "stages": [
            "calibrate",
            {"awq": {"grid": 20, "clip": True}},
            {"gptq": {"act_order": "static", "damp": 0.01}},
            {"kv_qparams": {"bits": 8, "symmetric": False, "granularity": "tensor"}},
            {"pack": {"format": "compressed-tensors"}},
            {"pack": {"format": "awq"}},
            {"shard": {"tp": 2}},
            {
                "evaluate": {
                    "data": "calib_data/demo_eval.txt",
                    "windows": 64,
                    "length": 512,
                    "gates": {"kl_mean": 0.05, "top1": 0.9},
                }
            },
        ],
    }


def test_the_schema_is_a_schema_and_describes_every_key() -> None:
    schema = json_schema(STAGES)
    Draft202012Validator.check_schema(schema)
    json.dumps(schema)
    assert schema["required"] == ["name", "stages"]
    sections = [schema, *schema["$defs"].values()]
    for section in sections:
        assert section["additionalProperties"] is False
        for key, value in section["properties"].items():
            described = {
                **schema["$defs"].get(value.get("$ref", "").removeprefix("#/$defs/"), {}),
                **value,
            }
            assert described.get("description"), f"{section['title']}.{key} has no description"
    stages = schema["properties"]["stages"]["items"]["anyOf"]
    assert [entry["const"] for entry in stages[:-1]] == [
        "calibrate",
        "awq",
        "gptq",
        "rtn",
        "nf4",
        "block_ap",
        "signround",
        "kv_qparams",
        "evaluate",
    ]
    assert list(stages[-1]["properties"]) == list(STAGES) == [
        "calibrate", "awq", "gptq", "rtn", "nf4", "block_ap", "signround",
        "kv_qparams", "pack", "shard", "evaluate"
    ]  # fmt: skip


# What the file may and may not say, by JSON schema and by pydantic alike.
VALID: list[dict[str, Any]] = [
    recipe(),
    recipe(seed=3, model=None, output="out"),
    recipe(calibration=None),
    recipe(
        stages=["rtn", {"kv_qparams": None}, {"pack": {"format": "awq", "max_shard_size": "5GB"}}]
    ),
    recipe(
        stages=[
            {"gptq": {"damp": 0.5}},
            {"pack": {"format": "awq", "max_shard_size": 4096}},
            {"shard": {"tp": 8}},
        ]
    ),
    recipe(stages=["rtn", {"pack": {"format": "compressed-tensors", "kv_scales": "fp8"}}]),
    recipe(
        stages=[
            "rtn",
            {"pack": {"format": "awq", "kv_scales": False}},
            {"pack": {"format": "gptq", "kv_scales": None}},
        ]
    ),
    recipe(
        weights={
            "group_size": -1,
            "overrides": [{"match": "*.q", "group_size": 4, "symmetric": True}],
        }
    ),
    recipe(
        stages=[
            {
                "evaluate": {
                    "data": "c4",
                    "file": "x.jsonl",
                    "gates": {"top1": 1, "perplexity_ratio": 1},
                }
            }
        ]
    ),
]
INVALID: list[tuple[dict[str, Any], str]] = [
    ({"stages": ["rtn"]}, "$"),
    ({"name": "x"}, "$"),
    (recipe(name="a b"), "$.name"),
    (recipe(extra=1), "$"),
    (recipe(seed=-1), "$.seed"),
    (recipe(seed="1"), "$.seed"),
    (recipe(calibration={"data": "c4", "seqlen": 8}), "$.calibration"),
    (recipe(weights={"bits": 9}), "$.weights.bits"),
    (recipe(weights={"group_size": 3}), "$.weights.group_size"),
    (recipe(weights={"ignore": "lm_head"}), "$.weights.ignore"),
    (recipe(weights={"overrides": [{"bits": 8}]}), "$.weights.overrides[0]"),
    (recipe(stages="rtn"), "$.stages"),
    (recipe(stages=["pack"]), "$.stages[0]"),
    (recipe(stages=["rtm"]), "$.stages[0]"),
    (recipe(stages=[{"rtn": {}, "pack": {"format": "awq"}}]), "$.stages[0]"),
    (recipe(stages=[{}]), "$.stages[0]"),
    (recipe(stages=[{"awq": {"grid": 0}}]), "$.stages[0]"),
    (recipe(stages=[{"gptq": {"damp": 1}}]), "$.stages[0]"),
    (recipe(stages=[{"gptq": {"damp": "0.1"}}]), "$.stages[0]"),
    (recipe(stages=[{"kv_qparams": {"bits": 4}}]), "$.stages[0]"),
    (recipe(stages=[{"pack": {"format": "gguv"}}]), "$.stages[0]"),
    (recipe(stages=[{"pack": {"format": "awq", "max_shard_size": "5"}}]), "$.stages[0]"),
    (recipe(stages=[{"pack": {"format": "compressed-tensors", "kv_scales": True}}]), "$.stages[0]"),
    (recipe(stages=[{"shard": {"tp": 6}}]), "$.stages[0]"),
    (recipe(stages=[{"evaluate": {"data": "c4", "gates": {"top1": 2}}}]), "$.stages[0]"),
]


@pytest.mark.parametrize("data", VALID)
def test_schema_and_types_accept(data: dict[str, Any]) -> None:
    assert errors(data) == []
    loaded = read_recipe(data, STAGES)
    assert read_recipe(dump(loaded), STAGES) == loaded


@pytest.mark.parametrize(("data", "place"), INVALID)
def test_schema_and_types_refuse(data: dict[str, Any], place: str) -> None:
    assert errors(data) == [place]
    with pytest.raises(ValidationError):
        read_recipe(data, STAGES)


def test_a_recipe_cannot_be_changed() -> None:
    loaded = read_recipe(recipe(), STAGES)
    with pytest.raises(ValidationError):
        loaded.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        loaded.stages[1].damp = 0.5  # type: ignore[union-attr, misc]


def test_stages_can_be_given_as_objects() -> None:
    loaded = read_recipe(recipe(stages=(Awq(grid=3), "rtn", Pack(format="awq"))), STAGES)
    assert loaded.stages[0] == Awq(grid=3)
    assert dump(loaded)["stages"][0] == {"awq": {"grid": 3, "clip": True, "max_tokens": 8192}}


@pytest.mark.parametrize(
    "value",
    [
        "5",
        "GB",
        "5 G B",
        "-5GB",
        "1e3GB",
        "0.5KB",
        1023,
        True,
        5e9,
        None,
        "",
        "5GB\n",
        "9" * 400 + "GB",
    ],
)
def test_what_is_no_size(value: Any) -> None:
    with pytest.raises(ValueError, match="a size such as"):
        parse_bytes(value)
