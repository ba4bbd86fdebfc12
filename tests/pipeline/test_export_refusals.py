"""What export must not do: lose the user's files, copy the reader's, cut a head in two, round
without a word, or take for ever."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantflow.errors import FormatError, ModelError, OutputError
from quantflow.formats.reader import Weights
from quantflow.pipeline.export import Options, export
from quantflow.stages.kv_parameters import per_rank
from tests.formats.test_made_elsewhere import whole
from tests.helpers.runs import Bench, contents, invoke, make_bench
from tests.helpers.tiny import write_tokenizer
from tests.helpers.zoo import specimen, write
from tests.pipeline.test_export import assert_same, made, tensors


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    stages = ["calibrate", "rtn", {"kv_qparams": {"granularity": "head"}}]
    weights = {"bits": 4, "group_size": 32, "symmetric": True}
    return made(tmp_path_factory.mktemp("refusals"), "gptq_v2", stages, weights=weights)


def changed_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- places


def test_what_lies_in_the_output_stays(bench: Bench, tmp_path: Path) -> None:
    """Even an artifact of ours: it may be the only one, and there may be notes in it."""
    export(bench.output, "awq", tmp_path / "out")
    (tmp_path / "out" / "quantflow.json").write_text("{}")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    began = time.monotonic()
    for place in (tmp_path / "out", tmp_path / "file"):
        with pytest.raises(OutputError, match="expected a new directory, or an empty one"):
            export(bench.output, "gptq", place)
    with pytest.raises(OutputError, match="inside the artifact"):
        export(tmp_path / "out", "gptq", bench.output / "new")
    assert (
        contents(tmp_path) == before
        and not (bench.output / "new").exists()
        and time.monotonic() - began < 30
    )
    (tmp_path / "empty").mkdir()
    export(bench.output, "gptq", tmp_path / "empty")


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.jinja",
        "tokenizer.model",
        "generation_config.json",
        "tokenizer_config.json",
        "config.json",
    ],
)
def test_links_to_the_readers_own_files_are_refused(
    bench: Bench, tmp_path: Path, name: str
) -> None:
    export(bench.output, "gptq_v2", tmp_path / "source")
    secret = tmp_path / "secret"
    place = tmp_path / "source" / name
    secret.write_bytes(place.read_bytes() if place.is_file() else b"secret")
    place.unlink(missing_ok=True)
    place.symlink_to(secret)
    result = invoke("export", tmp_path / "source", "--format", "awq", "--output", tmp_path / "out")
    assert (
        result.exit_code == 2
        and "leads out of the directory" in result.output
        and not (tmp_path / "out").exists()
    )


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "quantize_config.json"]
)
def test_pipes_and_devices_are_no_files(bench: Bench, tmp_path: Path, name: str) -> None:
    export(bench.output, "gptq_v2", tmp_path / "source")
    place = tmp_path / "source" / name
    place.unlink()
    if name == "quantize_config.json":
        changed_config(tmp_path / "source", quantization_config=None)
    os.mkfifo(place)
    began = time.monotonic()
    result = invoke("export", tmp_path / "source", "--format", "awq", "--output", tmp_path / "out")
    assert (
        result.exit_code in (0, 2)
        and "internal error" not in result.output
        and time.monotonic() - began < 30
    ), result.output
    # where it is left out, the tensors say it
    assert (result.exit_code == 0) == (name == "quantize_config.json")


# --- what a config may do


@pytest.mark.parametrize(
    "change",
    [
        {"group_size": 10**7},
        {"group_size": 10**9 + 7},
        {"group_size": 10**400},
        {"dynamic": {"+:([a-z_.0-9]+)+!": {}}},
        {"dynamic": {"+:(.*a?)*(.*b?)*$x": {}}},
        {"dynamic": {"+:" + ".*" * 30 + "x": {}}},
        {"dynamic": {"-:.*down_proj.*": {}}},
        {"bits": 6},
        {"dynamic": {"+:.*": []}},
        {"quant_method": "awq", "modules_to_not_convert": [1]},
        {"quant_method": "awq", "modules_to_not_convert": ["mlp"]},
    ],
)
def test_a_config_that_would_take_for_ever_or_contradicts_its_tensors(
    bench: Bench, tmp_path: Path, change: dict[str, Any]
) -> None:
    export(bench.output, "gptq_v2", tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())["quantization_config"]
    changed_config(tmp_path / "source", quantization_config=config | change)
    for command in (
        ("inspect", tmp_path / "source"),
        ("export", tmp_path / "source", "--format", "awq", "--output", tmp_path / "out"),
    ):
        began = time.monotonic()
        result = invoke(*command)
        assert "internal error" not in result.output and time.monotonic() - began < 30, (
            result.output
        )
    assert result.exit_code == 2 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [{"ignore": [1]}, {"config_groups": None}, {"config_groups": {}}, {"ignore": ["re:.*mlp.*"]}],
)
def test_compressed_tensors_that_contradict_their_config(
    bench: Bench, tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = tmp_path / "source"
    export(bench.output, "compressed-tensors", folder, Options(requantize=True))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    changed_config(folder, quantization_config=config | change)
    with pytest.raises((FormatError, ModelError), match=r"ignore|config_groups|leaves it alone"):
        Weights(folder)


def test_two_weights_of_one_module_leave_a_choice(bench: Bench, tmp_path: Path) -> None:
    export(bench.output, "gptq_v2", tmp_path / "source")
    found = load_file(tmp_path / "source" / "model.safetensors")
    found["model.layers.0.mlp.up_proj.weight"] = torch.zeros(128, 64, dtype=torch.bfloat16)
    save_file(found, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    (tmp_path / "source" / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match="up_proj: packed tensors, and a plain weight beside them"):
        Weights(tmp_path / "source")


# --- ranks


def test_ranks_cut_no_head_in_two(bench: Bench, tmp_path: Path) -> None:
    for source, form in ((bench.output, "gptq_v2"), (bench.model, "huggingface")):
        for tp, said in (
            (4, "2 KV heads; expected a multiple of 4"),
            (3, "4 attention heads; expected a multiple of 3"),
        ):
            with pytest.raises(FormatError, match=said):
                export(source, form, tmp_path / "no", Options(tp=tp, requantize=True))
    with pytest.raises(FormatError, match="gguf has no ranks"):
        export(bench.model, "gguf", tmp_path / "no", Options(tp=2))
    assert not (tmp_path / "no").exists()


def test_parameters_of_a_workspaces_ranks_serve_everybody(tmp_path: Path) -> None:
    """They become parameters by head, which any other number of ranks can be made of, exactly where
    its heads agree."""
    config = {
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "dtype": torch.float16,
    }
    bench = make_bench(tmp_path / "bench", **config)
    stages = [
        "calibrate",
        "rtn",
        "kv_qparams",
        {"pack": {"format": "turbomind"}},
        {"shard": {"tp": 2}},
    ]
    assert (
        invoke(
            "run",
            bench.recipe(stages=stages, weights={"bits": 4, "group_size": 128, "symmetric": False}),
        ).exit_code
        == 0
    )
    workspace = tmp_path / "workspace"
    # without the artifact's own parameters
    shutil.copytree(bench.output / "triton_models", workspace / "triton_models")
    kv = Weights(workspace).kv_parameters()
    name = "model.layers.0.self_attn.k_scale"
    assert kv[name].shape == (4,) and kv[name][0] == kv[name][1] != kv[name][2] == kv[name][3]
    export(workspace, "awq", tmp_path / "awq", Options(tp=2))
    assert torch.equal(load_file(tmp_path / "awq" / "kv_qparams.safetensors")[name], kv[name])
    assert torch.equal(
        load_file(tmp_path / "awq/tp2/rank-1/kv_qparams.safetensors")[name], kv[name][2:]
    )
    from quantflow import LLM

    assert "int8, calibrated" in LLM(tmp_path / "awq", device="cpu").engine.describe()["KV cache"]
    export(workspace, "turbomind", tmp_path / "four", Options(tp=4))  # finer ranks: exact
    assert torch.equal(Weights(tmp_path / "four").kv_parameters()[name], kv[name])
    with pytest.raises(FormatError, match="one scale for each layer and rank"):
        export(workspace, "turbomind", tmp_path / "one")
    done = export(workspace, "turbomind", tmp_path / "one", Options(requantize=True))
    assert (
        done.errors[name] > 0 and Weights(tmp_path / "one").kv_parameters()[name] >= kv[name].max()
    )


def test_scales_that_are_widened_cover_all_they_replace() -> None:
    scale, zero = torch.tensor([0.5, 1.0, 2.0, 4.0]), torch.tensor([0.0, 3.0, -1.0, 2.0])
    stored = {
        "a.k_scale": scale,
        "a.k_zero_point": zero,
        "a.v_scale": torch.tensor(1.0),
        "a.v_zero_point": torch.tensor(0.0),
    }
    found, errors = per_rank(stored, 4, 2, rounded=True)
    for rank in range(2):
        s, z = float(found["a.k_scale"][rank]), float(found["a.k_zero_point"][rank])
        for head in (2 * rank, 2 * rank + 1):
            for end in (-127.5, 127.5):
                value = float(zero[head]) + end * float(scale[head])
                assert abs(value - z) <= 127.5 * s * (1 + 1e-6)
    assert set(errors) == {"a.k_scale"} and found["a.v_scale"].dim() == 0
    assert per_rank(stored, 4, 4)[1] == {}


# --- nothing rounded without a word


def test_a_plain_checkpoint_in_16_bits_converts_every_tensor(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    found = load_file(bench.model / "model.safetensors")
    found["model.norm.weight"][0] = 2.0**-30  # a bfloat16 that float16 does not hold
    save_file(found, bench.model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        FormatError, match=r"model\.norm\.weight: 1 of 64 values are not exact in float16"
    ):
        export(bench.model, "huggingface", tmp_path / "no", Options(dtype="float16"))
    done = export(
        bench.model, "huggingface", tmp_path / "half", Options(dtype="float16", requantize=True)
    )
    assert done.errors["model.norm.weight"] > 0
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {
        torch.float16
    }
    found["model.norm.weight"][0] = 1e30
    save_file(found, bench.model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        FormatError, match=r"model\.norm\.weight: values beyond the range of float16"
    ):
        export(
            bench.model, "huggingface", tmp_path / "no", Options(dtype="float16", requantize=True)
        )


def test_an_exact_widening_is_no_error(tmp_path: Path) -> None:
    bench = made(
        tmp_path, "gptq_v2", ["rtn"], weights={"bits": 3, "group_size": 32, "symmetric": True}
    )
    done = export(bench.output, "awq", tmp_path / "awq", Options(requantize=True))
    assert done.errors == {} and not (tmp_path / "awq" / "requantized.json").exists()
    for name, value in tensors(bench.output).items():
        if isinstance(value, tuple):
            assert torch.equal(
                Weights(bench.output).tensor(name), Weights(tmp_path / "awq").tensor(name)
            )


def test_what_was_inexact_once_stays_so(bench: Bench, tmp_path: Path) -> None:
    first = export(bench.output, "bitsandbytes", tmp_path / "nf4", Options(requantize=True))
    export(tmp_path / "nf4", "bitsandbytes", tmp_path / "again")
    record = json.loads((tmp_path / "again" / "requantized.json").read_text())
    assert record["relative_errors"] == {} and record["before"]["relative_errors"] == dict(
        first.errors
    )


# --- one scheme for all


@pytest.mark.parametrize("form", ["awq", "turbomind", "bitsandbytes"])
def test_groups_of_several_sizes_become_one_that_fits_all(tmp_path: Path, form: str) -> None:
    """Inputs of 128 and 192: groups of 128 fit one of them, of 64 both."""
    bench = make_bench(
        tmp_path,
        hidden_size=128,
        intermediate_size=192,
        num_attention_heads=2,
        num_key_value_heads=2,
        dtype=torch.float16,
    )
    weights = {
        "bits": 4,
        "group_size": 128,
        "symmetric": False,
        "overrides": [{"match": "*.down_proj", "group_size": 32}],
    }
    assert (
        invoke(
            "run", bench.recipe(weights=weights, stages=["rtn", {"pack": {"format": "gptq_v2"}}])
        ).exit_code
        == 0
    )
    for source in (bench.output, bench.model):
        if source == bench.model and form == "turbomind":
            continue  # it is written as it is
        out = tmp_path / f"{form}-{source.name}"
        done = export(source, form, out, Options(requantize=True))
        schemes = {
            Weights(out).scheme_of(f"model.layers.{i}.{linear}")
            for i in range(2)
            for linear in ("self_attn.q_proj", "mlp.down_proj")
        }
        assert len({(s.bits, s.group_size) for s in schemes if s}) == 1 and None not in schemes, (
            schemes
        )
        assert max(done.errors.values()) < 0.15
    recipe = bench.recipe(
        "both", weights=weights, stages=["rtn", {"pack": {"format": form, "requantize": True}}]
    )
    result = invoke("run", recipe)
    assert result.exit_code == 0, result.output
    assert (
        json.loads((bench.output / "report.json").read_text())["requantized"][form]
        == json.loads((bench.output / "requantized.json").read_text())["relative_errors"]
    )


def test_a_whole_rows_scale_is_repeated_for_a_workspace(tmp_path: Path) -> None:
    bench = make_bench(
        tmp_path,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=2,
        num_key_value_heads=2,
        dtype=torch.float16,
    )
    recipe = bench.recipe(
        weights={"bits": 4, "group_size": -1, "symmetric": True},
        stages=["rtn", {"pack": {"format": "gptq_v2"}}],
    )
    assert invoke("run", recipe).exit_code == 0
    done = export(bench.output, "turbomind", tmp_path / "workspace", Options(requantize=True))
    assert done.errors == {} and str(done.scheme) == "W4 g128 symmetric"


# --- what lies outside the layers, and beside one another


def test_a_quantised_head_keeps_its_codes_or_is_refused(tmp_path: Path) -> None:
    source = whole("gptqmodel_v2_act_order", tmp_path / "source")
    head = Weights(source).quantized("lm_head")
    export(source, "gptq_v2", tmp_path / "same")
    again = Weights(tmp_path / "same").quantized("lm_head")
    assert (
        again.scheme == head.scheme
        and torch.equal(again.codes, head.codes)
        and torch.equal(again.scales, head.scales)
    )
    with pytest.raises(FormatError, match="lm_head"):
        export(source, "awq", tmp_path / "awq")
    done = export(source, "awq", tmp_path / "awq", Options(requantize=True))
    assert 0 < done.errors["lm_head.weight"] < 2**-8
    assert load_file(tmp_path / "awq" / "model.safetensors")["lm_head.weight"].dtype in (
        torch.float16,
        torch.bfloat16,
    )


def test_an_artifact_is_read_through_its_exact_format(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, intermediate_size=128)
    packs = [
        {"pack": {"format": "gguf", "requantize": True}},
        {"pack": {"format": "huggingface"}},
        {"pack": {"format": "gptq_v2"}},
    ]
    result = invoke(
        "run",
        bench.recipe(
            weights={"bits": 4, "group_size": 32, "symmetric": False}, stages=["rtn", *packs]
        ),
    )
    assert result.exit_code == 0, result.output
    assert (bench.output / "gguf" / "requantized.json").is_file()
    done = export(bench.output, "compressed-tensors", tmp_path / "again")
    assert done.source_format == "gptq_v2"
    assert_same(tensors(tmp_path / "again"), tensors(bench.output / "gptq_v2"))


def test_an_index_that_says_nothing_is_none(tmp_path: Path) -> None:
    """compressed-tensors of old wrote one for every module."""
    bench = made(
        tmp_path,
        "compressed-tensors",
        ["rtn"],
        weights={"bits": 4, "group_size": 32, "symmetric": True},
    )
    folder = tmp_path / "source"
    export(bench.output, "compressed-tensors", folder)
    found = load_file(folder / "model.safetensors")
    for name in [n for n in found if n.endswith(".weight_packed")]:
        module = name.removesuffix(".weight_packed")
        k = int(found[f"{module}.weight_shape"][1])
        found[f"{module}.weight_g_idx"] = (torch.arange(k) // 32).int()
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors.index.json").unlink()
    for form in ("awq", "gguf", "compressed-tensors"):
        export(folder, form, tmp_path / form)
        assert_same(tensors(tmp_path / form), tensors(bench.output))
    export(folder, "gptq", tmp_path / "ranks", Options(tp=2))


def test_mixtures_of_experts_go_where_they_can(tmp_path: Path) -> None:
    source = write(tmp_path / "mixtral", specimen("mixtral"))
    write_tokenizer(source)
    done = export(source, "compressed-tensors", tmp_path / "ct", Options(requantize=True))
    assert done.scheme is not None and done.scheme.symmetric
    with pytest.raises(FormatError, match="mixture of experts") as refused:
        export(source, "gguf", tmp_path / "no")
    assert "--requantize" not in str(refused.value)
