"""Recipes that round no weight: `calibrate` alone, and an int8 KV cache for a model that stays as
it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from quantflow.engine.llm import LLM
from tests.helpers.runs import Bench, invoke, make_bench

KV: list[Any] = ["calibrate", "kv_qparams", {"pack": {"format": "huggingface"}}]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("measuring"))


def recipe(bench: Bench, **changes: Any) -> Path:
    """Without `weights`, unless they are among the changes."""
    path = bench.recipe("measuring", **changes)
    content = yaml.safe_load(path.read_text())
    path.write_text(
        yaml.safe_dump(
            {key: value for key, value in content.items() if key != "weights" or key in changes}
        )
    )
    return path


def run(bench: Bench, stages: list[Any], *options: object, code: int = 0, **changes: Any) -> str:
    result = invoke("run", recipe(bench, stages=stages, **changes), *options)
    assert result.exit_code == code, result.output + result.stderr
    return result.stdout + result.stderr


def test_calibrate_alone_writes_the_statistics_of_any_recipe(bench: Bench, tmp_path: Path) -> None:
    run(bench, ["calibrate"], "--output", tmp_path / "alone")
    other = bench.recipe(
        "rounding",
        weights={"bits": 4, "group_size": 16},
        stages=["calibrate", "rtn", {"pack": {"format": "awq"}}],
    )
    assert invoke("run", other, "--output", tmp_path / "rounded").exit_code == 0
    alone, rounded = (
        load_file(tmp_path / name / "calibration.safetensors") for name in ("alone", "rounded")
    )
    assert alone.keys() == rounded.keys() and all(
        torch.equal(alone[name], rounded[name]) for name in alone
    )
    # Per layer: key and value by head and channel, seven linears' inputs and outputs
    assert alone["model.layers.1.key.absmax"].shape == (2, 16) and alone[
        "model.layers.1.mlp.down_proj.input.absmax"
    ].shape == (96,)
    names = {"calibration.safetensors", "quantflow.json", "report.html", "report.json", "run.json"}
    assert {path.name for path in (tmp_path / "alone").iterdir()} == names
    manifest = json.loads((tmp_path / "alone" / "quantflow.json").read_text())
    assert manifest["formats"] == {} and manifest["status"] == "complete"
    report = json.loads((tmp_path / "alone" / "report.json").read_text())
    assert report["linears"] == {} and len(report["kept"]) == 2 * 7 + 1
    assert "nothing to do" in run(bench, ["calibrate"], "--output", tmp_path / "alone")
    for verb in ("inspect", "verify"):
        refused = invoke(verb, tmp_path / "alone")
        assert refused.exit_code == 2 and "an artifact of statistics alone" in refused.stderr


def test_kv_parameters_of_a_model_that_stays_as_it_is(bench: Bench) -> None:
    bench.clear()
    run(bench, ["calibrate"], "--output", bench.output.parent / "before")
    measured = bench.layers()
    assert len(measured) == 2
    run(bench, [*KV, bench.evaluate()])
    assert bench.layers() == measured  # found in the store, and no further pass
    weights, written = (
        load_file(bench.model / "model.safetensors"),
        load_file(bench.output / "model.safetensors"),
    )
    assert weights.keys() == written.keys()
    assert all(
        weights[name].dtype == written[name].dtype and torch.equal(weights[name], written[name])
        for name in weights
    )
    config = json.loads((bench.output / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    found, statistics = (
        load_file(bench.output / "kv_qparams.safetensors"),
        load_file(bench.output / "calibration.safetensors"),
    )
    for index in range(2):
        # LMDeploy's: zp = (min + max) / 2, scale = (max - min) / 255
        for letter, name in (("k", "key"), ("v", "value")):
            low, high = (
                float(getattr(statistics[f"model.layers.{index}.{name}.{end}"], end)())
                for end in ("min", "max")
            )
            at = f"model.layers.{index}.self_attn.{letter}"
            assert float(found[f"{at}_zero_point"]) == pytest.approx((low + high) / 2, rel=1e-6)
            assert float(found[f"{at}_scale"]) == pytest.approx((high - low) / 255, rel=1e-6)
    quality = json.loads((bench.output / "quantflow.json").read_text())["quality"]
    assert quality.keys() == {"kv"} and 0 < quality["kv"]["kl_mean"] < 0.01
    assert (
        "calibrated"
        in LLM(str(bench.output), device="cpu", cache_bytes=2**20).engine.describe()["KV cache"]
    )


def test_its_gates_judge_the_kv_cache(bench: Bench, tmp_path: Path) -> None:
    said = run(
        bench, [*KV, bench.evaluate(gates={"kl_mean": 1e-9})], "--output", tmp_path / "out", code=3
    )
    assert "kl_mean is" in said and (tmp_path / "out" / "model.safetensors").is_file()


def test_a_workspace_takes_the_parameters_in(bench: Bench, tmp_path: Path) -> None:
    run(
        bench,
        ["calibrate", "kv_qparams", {"pack": {"format": "turbomind"}}],
        "--output",
        tmp_path / "workspace",
    )
    assert (
        "quant_policy = 4"
        in (tmp_path / "workspace" / "triton_models" / "weights" / "config.ini").read_text()
    )
    run(bench, KV, "--output", tmp_path / "plain")
    back = invoke(
        "export", tmp_path / "workspace", "--format", "huggingface", "--output", tmp_path / "back"
    )
    assert back.exit_code == 0, back.stderr
    there, here = (
        load_file(tmp_path / name / "kv_qparams.safetensors") for name in ("plain", "back")
    )
    assert there.keys() == here.keys() and all(
        torch.equal(there[name], here[name]) for name in there
    )


@pytest.mark.parametrize(
    ("stages", "changes", "fragments"),
    [
        (
            ["calibrate", {"pack": {"format": "awq"}}],
            {},
            ("pack awq: no stage rounds the weights", "Add `- rtn`"),
        ),
        (
            ["calibrate"],
            {"weights": {"bits": 4}},
            ("no stage rounds the weights", "a recipe that only measures has no `weights`"),
        ),
        (
            ["calibrate", {"pack": {"format": "huggingface"}}, "evaluate"],
            {},
            ("evaluate where nothing changes the model",),
        ),
        (
            ["kv_qparams", {"pack": {"format": "huggingface"}}],
            {},
            ("kv_qparams without calibrate",),
        ),
        (["calibrate", "kv_qparams", {"shard": {"tp": 2}}], {}, ("no stage writes a checkpoint",)),
    ],
)
def test_what_makes_no_sense_then(
    bench: Bench, stages: list[Any], changes: dict[str, Any], fragments: tuple[str, ...]
) -> None:
    stages = [bench.evaluate() if stage == "evaluate" else stage for stage in stages]
    result = invoke("plan", recipe(bench, stages=stages, **changes))
    assert result.exit_code == 2 and all(fragment in result.stderr for fragment in fragments), (
        result.stderr
    )


def test_the_plan_counts_what_it_will_do(bench: Bench) -> None:
    bench.clear()
    found = json.loads(invoke("plan", recipe(bench, stages=["calibrate"]), "--json").stdout)
    assert (
        found["linears"] == {"kept (no stage rounds the weights)": 14}
        and found["estimate"]["artifact_bytes"] == 0
    )
    run(bench, ["calibrate"])
    assert (
        json.loads(invoke("plan", recipe(bench, stages=["calibrate"]), "--json").stdout)[
            "stored_layers"
        ]
        == 2
    )


def test_another_text_is_another_measurement(bench: Bench, tmp_path: Path) -> None:
    """The cache's parameters come from the calibration's text: what was measured with others is not
    taken from the store."""
    found = []
    for samples, options in ((6, ()), (1, ()), (1, ("--fresh",))):
        stages = [*KV, bench.evaluate()]
        run(
            bench,
            stages,
            "--set",
            f"calibration.samples={samples}",
            "--output",
            tmp_path / "out" / "kv",
            *options,
        )
        found.append(
            json.loads((tmp_path / "out" / "kv" / "quantflow.json").read_text())["quality"]["kv"][
                "kl_mean"
            ]
        )
    assert found[0] != found[1] == found[2]
