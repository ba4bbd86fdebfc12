"""One thing under two names in a config.json: transformers' choice where it reads both, a refusal
that names both elsewhere."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.decoder.rope import inverse_frequencies
from quantflow.engine.text import Text
from quantflow.errors import ModelError
from quantflow.models.config import ConfigProblem
from quantflow.models.llama import read_llama_like
from quantflow.models.registry import ARCHITECTURES, family
from quantflow.models.spelling import SYNONYMS, settled
from quantflow.pipeline.plan import make_plan
from quantflow.pipeline.progress import Silent
from quantflow.pipeline.run import run
from quantflow.stages.registry import load_recipe
from tests.helpers.tiny import write_llama
from tests.helpers.zoo import ZOO, Specimen, specimen, write

Json = dict[str, Any]

BASE: Json = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 10,
    "max_position_embeddings": 256,
}
YARN: Json = {"rope_type": "yarn", "factor": 4.0}
LLAMA3: Json = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
PLAIN: Json = {"rope_type": "default", "rope_theta": 10000.0}

# what stands in config.json, and a word of what must be said of it ("" where nothing is overruled)
MERGED: list[tuple[str, Json, str]] = [
    (
        "scaling added as model cards say",
        {"rope_scaling": YARN, "rope_parameters": PLAIN},
        "rope_parameters rope_type",
    ),
    (
        "with the trained length",
        {
            "rope_scaling": {**YARN, "original_max_position_embeddings": 64},
            "rope_parameters": PLAIN,
        },
        "rope_type",
    ),
    (
        "and a theta beside both",
        {"rope_theta": 5e5, "rope_scaling": YARN, "rope_parameters": {**PLAIN, "rope_theta": 1e6}},
        "rope_theta",
    ),
    (
        "and a theta of its own",
        {"rope_scaling": {**YARN, "rope_theta": 7e5}, "rope_parameters": PLAIN},
        "rope_parameters rope_theta",
    ),
    (
        "three thetas",
        {"rope_theta": 5e5, "rope_scaling": {**YARN, "rope_theta": 7e5}, "rope_parameters": PLAIN},
        "rope_theta 500000.0",
    ),
    (
        "scaling taken back",
        {"rope_scaling": {"type": "default"}, "rope_parameters": {**YARN, "rope_theta": 10000.0}},
        "'yarn'",
    ),
    (
        "another factor",
        {"rope_scaling": {**YARN, "factor": 2.0}, "rope_parameters": {**YARN, **PLAIN, **YARN}},
        "rope_parameters factor",
    ),
    (
        "numbers of another kind",
        {"rope_scaling": YARN, "rope_parameters": {**LLAMA3, "rope_theta": 10000.0}},
        "rope_type",
    ),
    (
        "both the same",
        {"rope_scaling": YARN, "rope_parameters": {**YARN, "rope_theta": 10000.0}},
        "",
    ),
    ("an empty one", {"rope_scaling": {}, "rope_parameters": {**YARN, "rope_theta": 5e5}}, ""),
    ("none", {"rope_scaling": None, "rope_parameters": {**YARN, "rope_theta": 5e5}}, ""),
    (
        "two thetas",
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "rope_theta 500000.0",
    ),
    (
        "two equal thetas",
        {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000}},
        "",
    ),
    (
        "theta of the scaling",
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 1e6}},
        "rope_theta",
    ),
    ("type beside rope_type", {"rope_scaling": {**YARN, "type": "linear"}}, "type 'linear'"),
    ("the same type twice", {"rope_scaling": {**YARN, "type": "yarn"}}, ""),
    (
        "trained length inside and outside",
        {
            "rope_scaling": {**YARN, "original_max_position_embeddings": 64},
            "original_max_position_embeddings": 128,
        },
        "original_max_position_embeddings 64",
    ),
    (
        "of llama3",
        {
            "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64},
            "original_max_position_embeddings": 128,
        },
        "64",
    ),
    (
        "factor left to the lengths",
        {"rope_scaling": {**YARN, "factor": None, "original_max_position_embeddings": 64}},
        "",
    ),
]


def theirs(raw: Json) -> tuple[torch.Tensor, float, float]:
    config = LlamaConfig(**json.loads(json.dumps(raw)))
    embedding = LlamaRotaryEmbedding(config)
    return embedding.inv_freq, embedding.attention_scaling, config.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("changes", "said"), [case[1:] for case in MERGED], ids=[case[0] for case in MERGED]
)
def test_rotary_numbers_are_merged_as_transformers_merges_them(changes: Json, said: str) -> None:
    raw = BASE | changes
    frequencies, scaling, theta = theirs(raw)
    found, notes = settled(raw)
    # what is written says the same; and the order alone is right without being settled
    for config in (found, settled(found)[0], raw):
        decoder = read_llama_like(config)
        mine, factor = inverse_frequencies(decoder, 128)
        torch.testing.assert_close(mine, frequencies, rtol=1e-6, atol=0)
        assert (factor, decoder.rope.theta) == (pytest.approx(scaling, rel=1e-12), theta)
    assert any(said in note and "goes first" in note for note in notes) if said else not notes
    assert settled(found) == (found, ())
    assert (
        "rope_scaling" not in found or not found["rope_scaling"] or "rope_parameters" not in found
    )
    assert theirs(found)[1:] == (scaling, theta)
    torch.testing.assert_close(theirs(found)[0], frequencies, rtol=0, atol=0)
    # transformers 4 and others read these two alone
    if rope := found.get("rope_scaling"):
        assert (
            read_llama_like(
                BASE
                | {
                    "rope_scaling": rope,
                    "rope_theta": found.get("rope_theta", rope.get("rope_theta")),
                }
            ).rope
            == decoder.rope
        )


def test_a_theta_that_would_be_lost_is_refused() -> None:
    """rope_scaling replaces rope_parameters as a whole: transformers would fall back to 10000 in
    silence."""
    raw = BASE | {
        "rope_scaling": YARN,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    assert theirs(raw)[2] == 10000.0
    with pytest.raises(
        ConfigProblem, match=r"rope_scaling replaces rope_parameters.*rope_theta 1000000\.0"
    ):
        settled(raw)
    mixtral = raw | {"model_type": "mixtral"}  # whose default it is
    assert (
        AutoConfig.for_model(**json.loads(json.dumps(mixtral))).rope_parameters["rope_theta"] == 1e6
    )
    assert settled(mixtral)[0]["rope_theta"] == 1e6


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rotary_numbers_by_kind_of_layer_are_refused(key: str) -> None:
    with pytest.raises(
        ConfigProblem, match=rf"{key} has one object for each kind of layer \(full_attention\)"
    ):
        settled(BASE | {key: {"full_attention": YARN}})


def test_words_in_place_of_rotary_numbers_are_refused() -> None:
    with pytest.raises(ConfigProblem, match=r"attention_factor '1\.0'"):
        read_llama_like(BASE | {"rope_scaling": {**YARN, "attention_factor": "1.0"}})


PAIRS = [pair for names in SYNONYMS for pair in combinations(names, 2)]
VALUES: dict[str, tuple[Any, Any]] = {
    "hidden_act": ("silu", "gelu"),
    "attention_bias": (True, False),
    "tie_word_embeddings": (True, False),
    "quantization_config": ({"bits": 4}, {"bits": 8}),
    "rms_norm_eps": (1e-6, 1e-5),
}


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_two_names_of_one_thing_must_agree(pair: tuple[str, str]) -> None:
    group = next(names for names in SYNONYMS if set(pair) <= set(names))
    one, other = VALUES.get(group[0], (8, 4))
    bare = {k: v for k, v in BASE.items() if k not in group}
    assert settled(bare | dict.fromkeys(pair, one)) == (bare | dict.fromkeys(pair, one), ())
    assert settled(bare | {pair[0]: one, pair[1]: None})[1] == ()
    with pytest.raises(ConfigProblem) as caught:
        settled(bare | {pair[0]: one, pair[1]: other})
    assert all(name in str(caught.value) for name in pair)


def test_values_that_mean_the_same_agree() -> None:
    for changes in (
        {"hidden_act": "silu", "activation_function": "swish"},
        {"rms_norm_eps": 1e-5, "layer_norm_eps": 0.00001},
        {"attention_bias": False, "bias": "none"},
        {"dtype": "bfloat16", "torch_dtype": "torch.bfloat16"},
    ):
        assert settled(BASE | changes) == (BASE | changes, ())


def test_dtype_goes_before_torch_dtype() -> None:
    raw = BASE | {"dtype": "bfloat16", "torch_dtype": "float16"}
    assert str(LlamaConfig(**raw).dtype) == "torch.bfloat16"
    found, (note,) = settled(raw)
    assert (found["dtype"], found["torch_dtype"]) == (
        "bfloat16",
        "bfloat16",
    ) and "torch_dtype 'float16'" in note
    assert read_llama_like(raw).dtype == read_llama_like(found).dtype == "bfloat16"


@pytest.mark.parametrize("name", ZOO)
def test_configs_as_the_families_have_them_are_left_alone(name: str) -> None:
    raw = specimen(name).config
    assert settled(raw) == (raw, ())


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        (
            "qwen2",
            {"use_sliding_window": False, "layer_types": ["sliding_attention", "full_attention"]},
            ("layer_types", "use_sliding_window"),
        ),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": None,
                "layer_types": ["sliding_attention"] * 2,
            },
            ("layer_types", "sliding_window"),
        ),
        (
            "mistral",
            {"layer_types": ["full_attention", "sliding_attention"]},
            ("layer_types", "sliding_window"),
        ),
        (
            "mistral",
            {"sliding_window": None, "layer_types": ["sliding_attention"] * 2},
            ("layer_types", "sliding_window"),
        ),
        ("internlm", {"rope_theta": 5e5}, ("rotary", "rope_theta")),
        (
            "internlm",
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
            ("rotary", "rope_scaling"),
        ),
        (
            "internlm",
            {"rotary": {"base": 10000, "type": "origin"}, "rope_parameters": {**YARN}},
            ("rotary", "rope_parameters"),
        ),
        ("internlm", {"attention_bias": False}, ("bias", "attention_bias")),
        ("internlm2", {"attention_bias": True}, ("bias", "attention_bias")),
        ("qwen", {"bf16": True, "fp16": True}, ("bf16", "fp16")),
        ("qwen", {"rope_theta": 1e6}, ("rotary_emb_base", "rope_theta")),
        ("qwen", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ("rope_scaling",)),
        (
            "qwen",
            {"intermediate_size": 192, "ffn_hidden_size": 96},
            ("intermediate_size", "ffn_hidden_size"),
        ),
        ("opt", {"hidden_act": "gelu"}, ("activation_function", "hidden_act")),
        ("mixtral", {"num_experts": 8}, ("num_local_experts", "num_experts")),
        (
            "llama3",
            {
                "quantization_config": {"quant_method": "gptq"},
                "compression_config": {"quant_method": "compressed-tensors"},
            },
            ("quantization_config", "compression_config"),
        ),
    ],
)
def test_pairs_that_contradict_are_refused_by_name(
    name: str, changes: Json, named: tuple[str, ...], tmp_path: Path
) -> None:
    found = specimen(name)
    with pytest.raises(ModelError) as caught:
        Checkpoint(write(tmp_path, Specimen(found.config | changes, found.tensors)))
    (problem,) = caught.value.problems
    assert problem.where.endswith("config.json") and all(key in problem.found for key in named)


def test_pairs_that_agree_are_read(tmp_path: Path) -> None:
    for name, changes in (
        (
            "internlm",
            {
                "rope_theta": 10000.0,
                "rope_scaling": {"type": "dynamic", "factor": 1.0},
                "attention_bias": True,
            },
        ),
        ("qwen", {"rope_theta": 10000}),
        ("mixtral", {"num_experts": 4}),
        ("mistral", {"layer_types": ["sliding_attention"] * 2}),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}),
    ):
        found = specimen(name)
        architecture = family(found.config, Path())
        assert architecture.read_config(
            settled(found.config | changes)[0]
        ) == architecture.read_config(found.config), name


def test_the_experts_of_mixtral_under_either_name() -> None:
    raw = dict(specimen("mixtral").config)
    other = {**raw, "num_experts": raw["num_local_experts"]}
    del other["num_local_experts"]
    read = ARCHITECTURES["mixtral"].read_config
    assert (
        read(other) == read(raw)
        and AutoConfig.for_model(**other).num_local_experts == raw["num_local_experts"]
    )


@pytest.mark.parametrize(
    "name", ["llama3", "llama_bias", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "opt"]
)
def test_a_key_that_is_absent_is_what_transformers_takes_it_for(name: str) -> None:
    """Or it is refused."""
    raw = {**specimen(name).config, "num_attention_heads": 64, "head_dim": 16}
    raw = {k: v for k, v in raw.items() if name != "opt" or k != "head_dim"}
    read, asked = ARCHITECTURES[raw["model_type"]].read_config, 0
    for key in raw.keys() - {"model_type"}:
        less = {k: v for k, v in raw.items() if k != key}
        try:
            mine = read(settled(less)[0])
        except ConfigProblem:
            continue
        theirs = AutoConfig.for_model(**json.loads(json.dumps(less)))
        assert mine == read(settled(theirs.to_dict())[0]), key
        asked += 1
    assert asked > 12


def test_an_artifact_says_each_thing_once(tmp_path: Path) -> None:
    """case: rope_scaling added to a config that transformers 5 has saved."""
    changes = {
        "rope_parameters": PLAIN,
        "rope_scaling": {**YARN, "original_max_position_embeddings": 128},
        "torch_dtype": "float32",
    }
    folder = write_llama(tmp_path / "m", dtype=torch.bfloat16, **changes)
    (tmp_path / "r.yaml").write_text(
        "name: r\nweights: {bits: 8, group_size: 32}\nstages: [rtn, {pack: {format:"
        " compressed-tensors}}]\n"
    )
    plan = make_plan(
        load_recipe(tmp_path / "r.yaml", model=str(folder), output=str(tmp_path / "out")),
        device="cpu",
    )
    for key in ("rope_parameters", "torch_dtype"):
        assert any(key in note for note in plan.notes)
    run(plan, Silent())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        "rope_parameters" not in written
        and written["torch_dtype"] == written["dtype"] == "bfloat16"
    )
    assert settled(written) == (written, ())
    config = AutoConfig.from_pretrained(tmp_path / "out")
    frequencies, factor = inverse_frequencies(Checkpoint(tmp_path / "out").config, 64)
    rotary = LlamaRotaryEmbedding(config)
    torch.testing.assert_close(frequencies, rotary.inv_freq, rtol=1e-6, atol=0)
    assert factor == pytest.approx(1.138629436111989) == rotary.attention_scaling


def test_end_tokens_are_generation_configs_where_it_names_some(tmp_path: Path) -> None:
    """transformers and vLLM do not look at config.json then: what a class had as its default there
    may be an ordinary token."""
    folder = write_llama(tmp_path, eos_token_id=17)
    assert Text(folder).end_tokens == {1, 17}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert Text(folder).end_tokens == {1, 7, 9}
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    assert Text(folder).end_tokens == {1, 17}


def test_numbers_that_no_float_holds_are_unlike() -> None:
    """JSON's integers have any length; beside a float, one of 400 digits was no error of ours."""
    with pytest.raises(ConfigProblem, match="which means the same"):
        settled({"hidden_size": 64.5, "n_embd": 10**400})
