"""Artifacts, stores and checkpoints that somebody changed or damaged: found, named, and never taken
for good."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.runs import Bench, contents, invoke, make_bench

STAGES = ["rtn", {"pack": {"format": "compressed-tensors"}}, {"shard": {"tp": 2}}]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = make_bench(tmp_path_factory.mktemp("tampered"))
    assert invoke("run", bench.recipe(stages=STAGES)).exit_code == 0
    return bench


@pytest.fixture
def bench(made: Bench, tmp_path: Path) -> Bench:
    """A copy to spoil."""
    shutil.copytree(made.root, tmp_path / "copy")
    bench = Bench(tmp_path / "copy")
    bench.recipe(stages=STAGES)
    # Neither a recipe nor a store knows where it lies.
    assert "up to date" in again(bench)
    return bench


def again(bench: Bench) -> str:
    result = invoke("run", bench.root / "recipe.yaml")
    assert result.exit_code == 0, result.stderr
    return result.stdout


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    return result.stderr


def evaluate(bench: Bench, folder: Path) -> list[object]:
    return [
        "eval",
        folder,
        "--reference",
        bench.model,
        "--data",
        bench.root / "eval.txt",
        "--windows",
        2,
        "--length",
        32,
        "--json",
    ]


def test_a_flipped_byte_is_found_and_mended(bench: Bench) -> None:
    before = contents(bench.output)
    path = bench.output / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "written" in again(bench)
    assert contents(bench.output) == before


@pytest.mark.parametrize("name", ["quantflow.json", "report.json"])
def test_damaged_json_of_an_artifact_is_written_anew(bench: Bench, name: str) -> None:
    path = bench.output / name
    size = len(path.read_bytes())
    path.write_bytes(b"{" * size)
    assert "written" in again(bench)
    assert "up to date" in again(bench)


def test_a_manifest_without_its_keys(bench: Bench) -> None:
    path = bench.output / "quantflow.json"
    for changes in (
        {"quality": "x"},
        {"failed_gates": None},
        {"source": 1},
        {"formats": {"a": "../../model"}},
    ):
        kept = path.read_text()
        change_json(path, **changes)
        assert "quantflow.json" in refused("inspect", bench.output)
        path.write_text(kept)
    change_json(path, quality=None)
    assert "written" in again(bench)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_what_is_copied_into_the_artifact_is_part_of_its_identity(bench: Bench, name: str) -> None:
    path = bench.model / name
    path.write_text(
        json.dumps(
            {
                **(json.loads(path.read_text()) if path.exists() else {}),
                "chat_template": "{{ messages }}",
            }
        )
    )
    layers = bench.layers()
    assert "written" in again(bench)
    assert "{{ messages }}" in (bench.output / name).read_text()
    assert bench.layers() == layers


def test_a_torn_layer_in_the_store_is_done_again(bench: Bench) -> None:
    before = contents(bench.output)
    layer = next(bench.store.glob("*/layer-00001.safetensors"))
    layer.write_bytes(layer.read_bytes()[:-5])
    shutil.rmtree(bench.output)
    assert "written" in again(bench)
    assert contents(bench.output) == before


def test_a_rank_is_no_checkpoint(bench: Bench) -> None:
    assert "one of 2 tensor-parallel ranks" in refused(
        *evaluate(bench, bench.output / "tp2" / "rank-0")
    )
    assert "one of 2 tensor-parallel ranks" in refused("inspect", bench.output / "tp2" / "rank-0")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 3),
        ("num_attention_heads", 8),
        ("intermediate_size", 112),
        ("hidden_size", 80),
    ],
)
def test_a_config_that_disagrees_with_the_packed_weights(
    bench: Bench, key: str, value: int
) -> None:
    change_json(bench.output / "config.json", **{key: value, "head_dim": None})
    message = refused(*evaluate(bench, bench.output))
    assert str(bench.output) in message and ("config.json" in message or "does not have" in message)


def test_packed_layers_that_the_config_does_not_count_are_named(bench: Bench) -> None:
    """As of any checkpoint: what is packed there is no model's, and is left out by an export."""
    change_json(bench.output / "config.json", num_hidden_layers=1)
    told = invoke(*evaluate(bench, bench.output)).stderr
    assert "layer 1 copied as in the source, unquantised" in told
    made = invoke("export", bench.output, "--format", "gptq_v2", "--output", bench.root / "again")
    assert "layer beyond num_hidden_layers = 1, and not in floating point" in made.stdout, (
        made.stdout
    )


def test_zero_points_that_the_config_denies(bench: Bench) -> None:
    config = json.loads((bench.output / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = True
    change_json(bench.output / "config.json", **config)
    assert "weight_zero_point" in refused(*evaluate(bench, bench.output))


def test_biases_that_writers_of_gptq_add_are_zero_or_refused(bench: Bench) -> None:
    stages = [*STAGES[:1], {"pack": {"format": "gptq_v2"}}]
    assert invoke("run", bench.recipe(stages=stages)).exit_code == 0
    path = bench.output / "model.safetensors"
    (bench.output / "model.safetensors.index.json").unlink()
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.bias"
    tensors[name] = torch.zeros(
        tensors["model.layers.0.mlp.up_proj.scales"].shape[1], dtype=torch.bfloat16
    )
    save_file(tensors, path, {"format": "pt"})
    assert invoke(*evaluate(bench, bench.output)).exit_code == 0
    tensors[name][3] = 0.5
    save_file(tensors, path, {"format": "pt"})
    assert name in refused(*evaluate(bench, bench.output))


def test_scales_that_are_no_numbers(bench: Bench) -> None:
    path = bench.output / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("up_proj.weight_scale"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    assert "up_proj" in refused(*evaluate(bench, bench.output))


def test_a_norm_of_another_width(bench: Bench) -> None:
    path = bench.output / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, path, {"format": "pt"})
    assert "model.norm.weight" in refused(*evaluate(bench, bench.output))


def test_environment_variables(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = bench.recipe("other", stages=["gptq", {"pack": {"format": "awq"}}])
    monkeypatch.setenv("QUANTFLOW_ACTIVATION_BYTES", "abc")
    assert "QUANTFLOW_ACTIVATION_BYTES" in refused("run", recipe)
    monkeypatch.delenv("QUANTFLOW_ACTIVATION_BYTES")
    monkeypatch.setenv("QUANTFLOW_STORE", str(bench.root / "calib.txt"))
    assert "calib.txt" in refused("plan", recipe)


@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": "false"}, {"num_hidden_layers": 10**9}]
)
def test_config_values_that_mean_something_else(bench: Bench, changes: dict[str, Any]) -> None:
    change_json(bench.model / "config.json", **changes)
    assert next(iter(changes)) in refused("plan", bench.root / "recipe.yaml")
