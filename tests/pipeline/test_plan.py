"""`quantflow plan`: all that is known from the config and the headers, fast, and without reading a
weight."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import quantflow.artifacts.store as store_module
from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.checkpoints.tensor_file import ITEM_BYTES, TensorFile
from quantflow.models.expected import expected_tensors
from quantflow.report.page import report_page
from tests.helpers.runs import STAGES, Bench, invoke, make_bench
from tests.helpers.tiny import write_tokenizer
from tests.helpers.zoo import specimen, write

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192,
    "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip
PARAMETERS_70B = 68_976_648_192  # as Meta's index of Llama-2-70B says
KEYS = {
    "name", "model", "architecture", "layers", "device", "output", "calibration", "samples",
    "steps", "linears", "others", "stored_layers", "weight_bytes", "estimate", "notes", "tensors",
    "warnings",
}  # fmt: skip


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return make_bench(tmp_path)


def plan(recipe: Path, *arguments: object) -> dict[str, Any]:
    result = invoke("plan", recipe, "--json", *arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def recipe_70b(folder: Path) -> Path:
    content = {
        "name": "big",
        "model": str(folder / "model"),
        "output": str(folder / "out" / "artifact"),
        "calibration": {"data": "c4", "samples": 128, "seqlen": 2048},
        "weights": {"bits": 4, "group_size": 128},
        "stages": [*STAGES, {"evaluate": {"data": "wikitext2"}}],
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(LLAMA_70B))
    return path


@pytest.fixture
def no_weights_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("a plan must not read a weight")

    monkeypatch.setattr(TensorFile, "read", refuse)
    monkeypatch.setattr(store_module, "file_digest", refuse)


@pytest.mark.usefixtures("no_weights_read")
def test_a_70b_from_its_config_alone(tmp_path: Path) -> None:
    recipe = recipe_70b(tmp_path)
    began = time.monotonic()
    found = plan(recipe, "--config-only")
    assert time.monotonic() - began < 30
    assert found["weight_bytes"] == PARAMETERS_70B * 2
    assert found["layers"] == 80 and sum(found["linears"].values()) == 7 * 80
    estimate = found["estimate"]
    # A quarter of 16 bits, for every format and its ranks, plus scales, zeros, embedding and head.
    assert 0.25 < estimate["artifact_bytes"] / (3 * 2 * PARAMETERS_70B * 2) < 0.3
    assert estimate["peak_memory_bytes"] < 40 * 2**30
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_weights_read")
def test_a_70b_from_its_headers(tmp_path: Path) -> None:
    """Weight files of the right size that are holes: 138 GB to read, were they read."""
    recipe = recipe_70b(tmp_path)
    model = tmp_path / "model"
    checkpoint = Checkpoint(model, config_only=True)
    names = list(expected_tensors(checkpoint.architecture, checkpoint.config))
    weight_map = {}
    for part in range(15):
        file, header, offset = f"model-{part + 1:05}-of-00015.safetensors", dict[str, Any](), 0
        for name, shape in names[part::15]:
            size = math.prod(shape) * ITEM_BYTES["BF16"]
            header[name] = {
                "dtype": "BF16",
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
            weight_map[name] = file
        raw = json.dumps(header).encode()
        with open(model / file, "wb") as opened:
            opened.write(len(raw).to_bytes(8, "little") + raw)
            opened.truncate(8 + len(raw) + offset)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write_tokenizer(model)
    began = time.monotonic()
    found = plan(recipe)
    assert time.monotonic() - began < 30
    assert found["weight_bytes"] == PARAMETERS_70B * 2 and found["stored_layers"] is None


def test_the_keys_of_the_json(bench: Bench) -> None:
    found = plan(bench.recipe())
    assert set(found) == KEYS
    assert set(found["estimate"]) == {
        "peak_memory_bytes",
        "store_bytes",
        "artifact_bytes",
        "seconds",
    }
    assert [next(iter(step)) for step in found["steps"]] == [
        "calibrate", "awq", "gptq", "kv_qparams", "pack", "pack", "pack", "shard", "evaluate",
    ]  # fmt: skip
    assert found["steps"][2]["gptq"]["act_order"] == "static", "defaults are written out"
    assert sum(found["linears"].values()) == 14
    assert found["weight_bytes"] == (
        bench.model / "model.safetensors"
    ).stat().st_size - _header_bytes(bench)


def _header_bytes(bench: Bench) -> int:
    return 8 + int.from_bytes((bench.model / "model.safetensors").read_bytes()[:8], "little")


def test_overrides_are_resolved(bench: Bench) -> None:
    weights = {
        "group_size": 16,
        "overrides": [
            {"match": "*.down_proj", "bits": 8},
            {"match": "model.layers.0.*.o_proj", "ignore": True},
        ],
    }
    stages = ["rtn", {"pack": {"format": "compressed-tensors"}}]
    linears = plan(bench.recipe(weights=weights, stages=stages))["linears"]
    assert sorted(linears.values()) == [1, 2, 11]
    assert linears["kept (override model.layers.0.*.o_proj)"] == 1


@pytest.mark.usefixtures("no_weights_read")
def test_a_plan_writes_nothing(bench: Bench) -> None:
    recipe = bench.recipe()
    before = sorted(bench.root.rglob("*"))
    assert plan(recipe)["stored_layers"] is None
    assert sorted(bench.root.rglob("*")) == before
    text = invoke("plan", recipe).stdout
    assert (
        "not known before the weights are hashed" in text
        and "peak memory" in text
        and "14 ×" in text
    )


def test_what_the_store_has_is_shown(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = bench.recipe()
    raw = bytearray((bench.model / "model.safetensors").read_bytes())
    info = TensorFile(bench.model / "model.safetensors").tensors[
        "model.layers.1.mlp.up_proj.weight"
    ]
    good = raw[info.start : info.start + 2]
    raw[info.start : info.start + 2] = b"\xff\xff"  # NaN in bfloat16
    (bench.model / "model.safetensors").write_bytes(raw)
    gptq_alone = ("--set", "name=tiny")
    rest = ["gptq", {"pack": {"format": "awq"}}]
    assert invoke("run", bench.recipe("half", stages=rest)).exit_code == 2
    assert plan(bench.recipe("half", stages=rest), *gptq_alone)["stored_layers"] == 1
    assert "1 of 2 layers" in invoke("plan", bench.recipe("half", stages=rest)).stdout

    raw[info.start : info.start + 2] = good
    (bench.model / "model.safetensors").write_bytes(raw)
    assert plan(recipe)["stored_layers"] is None, "other weights: not hashed yet"
    assert invoke("run", recipe).exit_code == 0
    assert plan(recipe)["stored_layers"] == 2
    assert plan(recipe, "--set", "stages.gptq.damp=0.02")["stored_layers"] == 0
    assert plan(recipe, "--set", "stages.evaluate.windows=2")["stored_layers"] == 2
    assert (
        plan(recipe, "--config-only")["stored_layers"] is None
        and plan(recipe, "--config-only")["tensors"] is None
    )


def test_a_plan_needs_no_hub(bench: Bench) -> None:
    """Data sets by name are not fetched to plan; what the store has is then not known."""
    recipe = bench.recipe(calibration={"data": "c4", "samples": 2, "seqlen": 16}, stages=STAGES)
    assert plan(recipe)["stored_layers"] is None


def test_the_estimate_grows_with_what_costs(bench: Bench) -> None:
    def estimate(**changes: Any) -> dict[str, Any]:
        return plan(bench.recipe(**changes))["estimate"]

    base = {"stages": ["gptq", {"pack": {"format": "compressed-tensors"}}]}
    data = str(bench.root / "calib.txt")
    few, many = (
        estimate(**base, calibration={"data": data, "samples": n, "seqlen": 64}) for n in (4, 4096)
    )
    assert (
        many["peak_memory_bytes"] > few["peak_memory_bytes"]
        and many["store_bytes"] > few["store_bytes"]
    )
    assert many["seconds"] > few["seconds"] and many["artifact_bytes"] == few["artifact_bytes"]
    wide = estimate(**base, weights={"bits": 8, "group_size": 16})
    assert wide["artifact_bytes"] > few["artifact_bytes"]
    twice, one, other = (
        estimate(stages=["gptq", *({"pack": {"format": name}} for name in names)])["artifact_bytes"]
        for names in (("compressed-tensors", "gptq_v2"), ("compressed-tensors",), ("gptq_v2",))
    )
    assert twice == one + other


def test_the_estimate_of_the_disk_is_what_is_written(bench: Bench) -> None:
    packs = [{"pack": {"format": name}} for name in ("compressed-tensors", "huggingface")]
    recipe = bench.recipe(stages=["rtn", *packs, {"shard": {"tp": 2}}])
    expected = plan(recipe)["estimate"]["artifact_bytes"]
    assert invoke("run", recipe).exit_code == 0
    files = [TensorFile(path) for path in bench.output.rglob("model.safetensors")]
    assert (
        len(files) == 6
        and sum(info.nbytes for file in files for info in file.tensors.values()) == expected
    )


# What a recipe leaves to the model

AUTO = (
    "name: x\ncalibration: {samples: 2}\nweights: {group_size: auto}\nstages: [gptq, pack: {format:"
    " compressed-tensors}, evaluate]\n"
)


def automatic(folder: Path, text: str = AUTO, *, layers: int = 1, **config: Any) -> dict[str, Any]:
    """The plan of a recipe that says `auto`, for a Llama of one layer of that shape."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text(
        json.dumps({**LLAMA_70B, "num_hidden_layers": layers, **config})
    )
    path = folder / "auto.yaml"
    path.write_text(text)
    return plan(
        path, "--model", folder / "model", "--output", folder / "out" / "a", "--config-only"
    )


@pytest.mark.parametrize(
    ("positions", "calibration", "evaluation"),
    [(131072, 2048, 512), (1024, 1024, 512), (100, 100, 100)],
)
def test_auto_lengths_are_within_the_models_positions(
    positions: int, calibration: int, evaluation: int, tmp_path: Path
) -> None:
    found = automatic(tmp_path, max_position_embeddings=positions)
    assert found["calibration"] == {"data": "demo", "windows": 2, "length": calibration}
    assert found["steps"][-1]["evaluate"]["length"] == evaluation
    assert [note.partition(" reads the bundled text")[0] for note in found["notes"]] == [
        "calibration",
        "evaluate",
    ]


@pytest.mark.parametrize(
    ("hidden", "inner", "change", "group"),
    [
        (8192, 28672, "", 128),
        (576, 1536, "", 64),  # SmolLM2-135M: 9 and 24 times 64
        (896, 4864, "", 128),  # Qwen2-0.5B
        (2048, 5632, "", 128),
        (96, 160, "", 32),
        (72, 108, "", 36),  # no usual one fits
        (64, 172, "", 0),  # nor any that is worth its scales: the greatest common divisor is 4
        # what stays in 16 bits asks for nothing
        (128, 96, "ignore: ['lm_head', '*.down_proj'],", 128),
        # nor what has its own
        (128, 96, "overrides: [{match: '*.down_proj', group_size: 48}],", 128),
    ],
)
def test_an_auto_group_is_the_largest_usual_one_that_fits_all_linears(
    hidden: int, inner: int, change: str, group: int, tmp_path: Path
) -> None:
    text = AUTO.replace("{group_size", f"{{{change} group_size")
    found = automatic(
        tmp_path,
        text,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    (most, *_), counts = (
        sorted(found["linears"], key=lambda scheme: -found["linears"][scheme]),
        found["linears"],
    )
    assert f" g{group} " in most if group else most == "W4 channel asymmetric"
    assert counts[most] >= 6
    said = [note for note in found["notes"] if note.startswith("weights.group_size auto is ")]
    assert len(said) == (group in (0, 36)) and all(f"is {group or -1}," in note for note in said)


def test_what_is_advised_is_worth_its_scales(tmp_path: Path) -> None:
    """172 inputs are divided by 4 and by 86: the first would take 8 bits a weight."""
    for asked, shape in (
        (32, {"hidden_size": 64, "intermediate_size": 172}),
        (128, {"hidden_size": 128, "intermediate_size": 172}),
    ):
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
        with pytest.raises(AssertionError) as refused:
            automatic(
                tmp_path, AUTO.replace("group_size: auto", f"group_size: {asked}"), **shape, **heads
            )
        fitting = -1 if asked == 32 else 86
        assert f'{{match: "*.down_proj", group_size: {fitting}}}' in str(refused.value)
        assert f"Use group_size {'86 or -1' if fitting == 86 else '-1'} (per channel)" in str(
            refused.value
        )


def test_an_auto_group_fits_each_rank(tmp_path: Path) -> None:
    """down_proj's 512 inputs are 128 on each of four ranks, 64 on each of eight."""
    for tp, group in ((4, 128), (8, 64)):
        text = AUTO.replace(", evaluate]", f", shard: {{tp: {tp}}}, evaluate]")
        found = automatic(
            tmp_path,
            text,
            hidden_size=1024,
            intermediate_size=512,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
        assert list(found["linears"]) == [f"W4 g{group} asymmetric"]


def test_what_engines_will_not_load_is_a_warning(bench: Bench) -> None:
    """It is shown by plan, run and export, and kept in the report; the exit code is 0."""
    weights = {
        "bits": 4,
        "group_size": 32,
        "symmetric": False,
        "overrides": [{"match": "*.k_proj", "ignore": True}],
    }
    recipe = bench.recipe(
        weights=weights,
        stages=["rtn", {"pack": {"format": "gptq_v2"}}, {"pack": {"format": "compressed-tensors"}}],
    )
    warnings = plan(recipe)["warnings"]
    assert [warning.partition(":")[0] for warning in warnings] == [
        "pack gptq_v2, vLLM 0.32 and SGLang",
        "pack gptq_v2, vLLM 0.32",
        "pack gptq_v2, LMDeploy 0.18 (TurboMind)",
        "pack compressed-tensors, vLLM 0.32 and SGLang",
    ]
    assert "wrong weights, without a word" in warnings[2]
    shown = invoke("plan", recipe)
    assert (
        shown.exit_code == 0
        and shown.output.count("Warning: ") == 4
        and "q_proj W4 g32 asymmetric, k_proj in 16 bits" in shown.output
    )
    done = invoke("run", recipe)
    assert done.exit_code == 0 and done.output.count("Warning: ") == 4
    report = json.loads((bench.output / "report.json").read_text())
    assert report["warnings"] == warnings and "wrong weights, without a word" in report_page(report)
    again = invoke("export", bench.output, "--format", "gptq_v2", "--output", bench.root / "again")
    assert again.exit_code == 0 and again.output.count("Warning: gptq_v2, ") == 3


@pytest.mark.parametrize(
    ("formats", "symmetric"),
    [
        (["gptq"], True),
        (["gptq_v2", "awq"], True),
        (["gguf"], True),
        (["awq", "gptq"], False),
        (["compressed-tensors"], False),
        (["turbomind"], False),
        (["huggingface"], False),
    ],
)
def test_weights_are_symmetric_where_the_first_pack_is_best_loaded_so(
    formats: list[str], symmetric: bool, tmp_path: Path
) -> None:
    bench = make_bench(tmp_path, intermediate_size=128, dtype=torch.float16)
    weights: dict[str, Any] = {"bits": 4, "group_size": 32}
    stages = [
        "rtn",
        *({"pack": {"format": name, "requantize": name == "turbomind"}} for name in formats),
    ]
    word = {True: "symmetric", False: "asymmetric"}
    for said in ({}, {"symmetric": "auto"}, {"symmetric": None}):
        assert plan(bench.recipe(weights=weights | said, stages=stages))["linears"] == {
            f"W4 g32 {word[symmetric]}": 14
        }
    if formats != ["gguf"]:  # which does not hold every asymmetric weight
        other = plan(bench.recipe(weights=weights | {"symmetric": not symmetric}, stages=stages))
        assert other["linears"] == {f"W4 g32 {word[not symmetric]}": 14}


def test_mixtures_are_symmetric_in_compressed_tensors_and_their_routers_may_be_ignored(
    tmp_path: Path,
) -> None:
    bench = make_bench(tmp_path)
    shutil.rmtree(bench.model)
    write(bench.model, specimen("mixtral"))
    stages = ["rtn", {"pack": {"format": "compressed-tensors"}}]

    def weights(**more: Any) -> dict[str, Any]:
        return {"bits": 4, "group_size": 32, **more}

    usual = plan(bench.recipe(weights=weights(), stages=stages))
    assert usual["linears"] == {"W4 g32 symmetric": 32}
    for ignore in (["lm_head", "*.gate"], ["lm_head", "embed_tokens", "*layernorm"], ["*"]):
        result = invoke(
            "plan", bench.recipe(weights=weights(ignore=ignore), stages=stages), "--json"
        )
        assert (
            result.exit_code == 0 and json.loads(result.stdout)["linears"] == usual["linears"]
        ) == (ignore != ["*"]), result.stderr
    over = weights(overrides=[{"match": "*.gate", "ignore": True}])
    assert plan(bench.recipe(weights=over, stages=stages))["linears"] == usual["linears"]
    for wrong in ({"match": "*.gate", "bits": 8}, {"match": "*.gaet", "ignore": True}):
        result = invoke("plan", bench.recipe(weights=weights(overrides=[wrong]), stages=stages))
        assert result.exit_code == 2 and "matches no linear of the model" in result.stderr


def test_ignoring_what_is_not_there_is_said_and_changes_nothing(tmp_path: Path) -> None:
    """llm-compressor's lists name a mixture's router for every model; a slip of the pen leaves
    nothing alone and must be seen."""
    bench = make_bench(tmp_path)
    usual = plan(bench.recipe())
    pasted = plan(
        bench.recipe(
            weights={"group_size": 16, "ignore": ["lm_head", "*.gate", "*.block_sparse_moe.gate"]}
        )
    )
    assert (
        pasted["linears"]
        == usual["linears"]
        == plan(bench.recipe(weights={"group_size": 16}))["linears"]
    )
    said = [warning for warning in pasted["warnings"] if warning not in usual["warnings"]]
    assert [warning.partition(";")[0] for warning in said] == [
        f"weights.ignore {pattern!r}: matches no linear of the model"
        for pattern in ("*.gate", "*.block_sparse_moe.gate")
    ]
    assert not any("Did you mean" in warning for warning in said)
    path = bench.recipe(
        weights={
            "group_size": 16,
            "ignore": ["lm_head", "*.self_attn.k_porj", "model.norm", "embed_tokens"],
        }
    )
    said = [warning for warning in plan(path)["warnings"] if "ignore" in warning]
    assert len(said) == 1 and said[0].endswith("Did you mean '*.self_attn.k_proj'?")
    done = invoke("run", path)
    assert done.exit_code == 0 and "k_porj" in done.output + done.stderr
    assert said[0] in json.loads((bench.output / "report.json").read_text())["warnings"]
