"""`quantflow run` from a recipe to its artifact: what is there, what a second run repeats, ranks,
quality figures."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.runs import STAGES, Bench, contents, invoke, make_bench

FORMATS = ("compressed-tensors", "awq", "gptq_v2")
COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW = ("o_proj", "down_proj")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The tiny Llama with biases on its attention, and the artifact of the full recipe."""
    bench = make_bench(tmp_path_factory.mktemp("run"), attention_bias=True)
    tensors, generator = (
        load_file(bench.model / "model.safetensors"),
        torch.Generator().manual_seed(9),
    )
    for name in [n for n in tensors if "self_attn" in n]:
        rows = len(tensors[name])
        tensors[name.replace(".weight", ".bias")] = (
            torch.randn(rows, generator=generator) * 0.05
        ).to(torch.bfloat16)
    save_file(tensors, bench.model / "model.safetensors", {"format": "pt"})
    result = invoke(
        "run", bench.recipe(stages=[*STAGES, bench.evaluate(gates={"kl_mean": 1.0, "top1": 0.1})])
    )
    assert result.exit_code == 0, result.stderr
    assert "written" in result.stdout and "14 linears quantised, 1 kept" in result.stdout
    return bench


@pytest.fixture
def fresh(bench: Bench, tmp_path: Path) -> Bench:
    """The same model and texts, with an output and a store of its own."""
    shutil.copytree(bench.model, tmp_path / "model")
    for name in ("calib.txt", "eval.txt"):
        shutil.copy(bench.root / name, tmp_path / name)
    return Bench(tmp_path)


def run(bench: Bench, *arguments: object, code: int = 0, **changes: Any) -> str:
    """What the command says; `changes` go into the recipe."""
    result = invoke("run", bench.recipe(**changes), *arguments)
    assert result.exit_code == code, result.stderr
    assert "Traceback" not in result.output
    return result.stdout + result.stderr if code else result.stdout


def gates(bench: Bench, **limits: float) -> list[Any]:
    return [*STAGES, bench.evaluate(gates=limits)]


# What is there


def test_the_artifact_is_whole(bench: Bench) -> None:
    manifest = json.loads((bench.output / "quantflow.json").read_text())
    assert manifest["status"] == "complete" and manifest["failed_gates"] == []
    assert manifest["formats"] == {f: f for f in FORMATS} and manifest["tensor_parallel"] == 2
    found = contents(bench.output, skip=("quantflow.json", "run.json", "report.html"))
    assert set(manifest["files"]) == set(found)
    assert all(entry["bytes"] == len(found[name]) for name, entry in manifest["files"].items())
    for form in FORMATS:
        for folder in (
            bench.output / form,
            *(bench.output / form / "tp2" / f"rank-{r}" for r in range(2)),
        ):
            names = {p.name for p in folder.iterdir()}
            assert {
                "config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json",
            } <= names
            assert json.loads((folder / "config.json").read_text())["quantization_config"][
                "quant_method"
            ] == form.removesuffix("_v2")
    report = json.loads((bench.output / "report.json").read_text())
    assert len(report["linears"]) == 14 and report["kept"] == {"lm_head": "weights.ignore"}
    assert bench.leavings() == []


def test_nothing_of_the_machine_is_in_the_artifact(bench: Bench) -> None:
    """Times, host and places are in run.json alone."""
    record = json.loads((bench.output / "run.json").read_text())
    assert {"seconds", "finished", "host", "peak_resident_bytes"} <= set(record)
    assert record["threads"] == torch.get_num_threads()
    for name, data in contents(bench.output).items():
        assert str(bench.root).encode() not in data, name
        assert record["finished"][:13].encode() not in data, name


def test_calibration_statistics_are_the_models(bench: Bench) -> None:
    """The embedding of the calibration's tokens, normalised, is the first layer's input: its
    extremes are known by hand."""
    from tokenizers import Tokenizer

    tokens = _windows(
        Tokenizer.from_file(str(bench.model / "tokenizer.json")), bench.root / "calib.txt", 6, 32
    )
    source = load_file(bench.model / "model.safetensors")
    x = source["model.embed_tokens.weight"][torch.tensor(tokens)].float()
    h = (
        x
        * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        * source["model.layers.0.input_layernorm.weight"].float()
    ).reshape(-1, 64)
    found = load_file(bench.output / "calibration.safetensors")
    for linear in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{linear}.input"
        for statistic, expected in {
            "max": h.amax(0),
            "min": h.amin(0),
            "mean": h.mean(0),
            "absmax": h.abs().amax(0),
            "absmean": h.abs().mean(0),
        }.items():
            torch.testing.assert_close(found[f"{name}.{statistic}"], expected, rtol=0.01, atol=0.01)


# What a second run repeats


def test_a_second_run_does_nothing_and_says_so(bench: Bench) -> None:
    def files() -> dict[Path, int]:
        return {
            p: p.stat().st_mtime_ns
            for p in (bench.root / "out").rglob("*")
            if p.is_file() and p.name != ".lock"
        }

    before = files()
    text = run(bench, stages=gates(bench, kl_mean=1.0, top1=0.1))
    assert "up to date: nothing to do" in text and "Quality on held-out text" in text
    assert files() == before
    assert (
        json.loads(run(bench, "--json", stages=gates(bench, kl_mean=1.0, top1=0.1)))["existed"]
        is True
    )


def test_two_runs_are_byte_identical(bench: Bench, fresh: Bench) -> None:
    run(fresh, stages=gates(bench=fresh, kl_mean=1.0, top1=0.1))
    assert contents(fresh.output) == contents(bench.output)


def test_changing_an_artifact_stage_repeats_no_layer(fresh: Bench) -> None:
    base: list[Any] = ["calibrate", {"awq": {"grid": 3}}, "gptq", "kv_qparams"]
    weights = {"bits": 4, "group_size": 16, "symmetric": False}  # which would follow the first pack
    run(
        fresh,
        stages=[*base, {"pack": {"format": "compressed-tensors"}}, fresh.evaluate()],
        weights=weights,
    )
    layers = fresh.layers()
    assert len(layers) == 4  # two of the calibration, two of the sweep
    variants: dict[str, list[Any]] = {
        "another format": [*base, {"pack": {"format": "awq"}}, fresh.evaluate()],
        "two formats": [
            *base,
            {"pack": {"format": "gptq_v2"}},
            {"pack": {"format": "compressed-tensors"}},
            fresh.evaluate(),
        ],
        "several files": [
            *base,
            {"pack": {"format": "compressed-tensors", "max_shard_size": 40000}},
            fresh.evaluate(),
        ],
        "ranks": [
            *base,
            {"pack": {"format": "compressed-tensors"}},
            {"shard": {"tp": 2}},
            fresh.evaluate(),
        ],
        "other text": [
            *base,
            {"pack": {"format": "compressed-tensors"}},
            fresh.evaluate(windows=3, length=16),
        ],
        "no evaluation": [*base, {"pack": {"format": "compressed-tensors"}}],
        "granularity": [
            *base[:3],
            {"kv_qparams": {"granularity": "channel"}},
            {"pack": {"format": "compressed-tensors"}},
            fresh.evaluate(),
        ],
        "symmetric KV": [
            *base[:3],
            {"kv_qparams": {"symmetric": True}},
            {"pack": {"format": "compressed-tensors"}},
            fresh.evaluate(),
        ],
    }
    for name, stages in variants.items():
        text = run(fresh, stages=stages, weights=weights)
        assert "written" in text, name
        assert fresh.layers() == layers, name
    run(
        fresh,
        stages=[
            *base[:2],
            {"gptq": {"damp": 0.02}},
            "kv_qparams",
            {"pack": {"format": "compressed-tensors"}},
        ],
        weights=weights,
    )
    assert len(fresh.layers()) == 6  # another gptq: the sweep again, the calibration not
    run(
        fresh,
        stages=[*base, {"pack": {"format": "compressed-tensors"}}],
        calibration={"data": str(fresh.root / "calib.txt"), "samples": 5, "seqlen": 32},
    )
    assert len(fresh.layers()) == 10  # other tokens: all of it again


def test_gptq_v1_of_a_symmetric_grid_repeats_no_layer(fresh: Bench) -> None:
    weights = {"bits": 4, "group_size": 16, "symmetric": True}
    run(fresh, stages=["gptq", {"pack": {"format": "compressed-tensors"}}], weights=weights)
    layers = fresh.layers()
    run(fresh, stages=["gptq", {"pack": {"format": "gptq"}}], weights=weights)
    assert fresh.layers() == layers and len(layers) == 2


def test_fresh_begins_again(fresh: Bench) -> None:
    run(fresh)
    artifact, layers = contents(fresh.output), fresh.layers()
    qualities = {p: p.stat().st_ino for p in fresh.store.glob("*/quality.json")}
    assert "written" in run(fresh, "--fresh")
    assert contents(fresh.output) == artifact
    again = fresh.layers()
    assert set(again) == set(layers) and all(again[name] != layers[name] for name in layers)
    assert all(p.stat().st_ino != inode for p, inode in qualities.items()) and qualities


@pytest.mark.parametrize("harm", ["cut", "gone", "manifest"])
def test_a_damaged_artifact_is_written_again(fresh: Bench, harm: str) -> None:
    run(fresh)
    artifact, layers = contents(fresh.output), fresh.layers()
    target = fresh.output / (
        "quantflow.json" if harm == "manifest" else "awq/tp2/rank-1/model.safetensors"
    )
    if harm == "gone":
        target.unlink()
    else:
        target.write_bytes(target.read_bytes()[:-100])
    assert "written" in run(fresh)
    assert contents(fresh.output) == artifact and fresh.layers() == layers


def test_weights_that_change_are_noticed(fresh: Bench) -> None:
    run(fresh)
    before = contents(fresh.output)
    tensors = load_file(fresh.model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 2
    save_file(tensors, fresh.model / "model.safetensors", {"format": "pt"})
    assert "written" in run(fresh)
    assert contents(fresh.output) != before


def test_the_output_may_be_a_link(fresh: Bench) -> None:
    place = fresh.root / "elsewhere"
    place.mkdir()
    fresh.output.parent.mkdir()
    fresh.output.symlink_to(place)
    run(fresh)
    assert fresh.output.is_symlink() and (place / "quantflow.json").is_file()
    assert "written" in run(fresh, "--set", "seed=1")
    assert (
        sorted(p.name for p in fresh.root.iterdir() if "partial" in p.name)
        == []
        == fresh.leavings()
    )


def test_the_output_may_be_the_current_folder(
    fresh: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = fresh.root / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    run(fresh, "--output", ".")
    assert (place / "quantflow.json").is_file() and not (place / ".quantflow-store").exists()


def test_two_runs_at_once_are_refused(fresh: Bench) -> None:
    fresh.store.mkdir(parents=True)
    with open(fresh.store / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another run is using this store" in run(fresh, code=2)
    assert not fresh.output.exists()
    run(fresh)


def test_the_store_can_be_elsewhere(fresh: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTFLOW_STORE", str(fresh.root / "cache"))
    run(fresh)
    assert list((fresh.root / "cache").glob("*/layer-*")) and not fresh.store.exists()


# Gates


def test_a_missed_gate_keeps_the_artifact_and_marks_it(fresh: Bench) -> None:
    stages = gates(fresh, kl_mean=1e-7, top1=1.0)
    text = run(fresh, code=3, stages=stages)
    assert (
        "quality gate failed" in text
        and "kl_mean is" in text
        and "the gate is at most 1e-07" in text
        and "the gate is at least 1" in text
    )
    manifest = json.loads((fresh.output / "quantflow.json").read_text())
    assert manifest["status"] == "failed" and len(manifest["failed_gates"]) == 2
    assert (fresh.output / "awq" / "model.safetensors").is_file()
    layers = fresh.layers()
    again = run(fresh, code=3, stages=stages)
    assert "nothing to do" in again and "quality gate failed" in again
    # A wider gate needs no new measurement, let alone a new sweep.
    quality = [(p, p.stat().st_mtime_ns) for p in fresh.store.glob("*/quality.json")]
    run(fresh, stages=gates(fresh, kl_mean=1.0, top1=0.1))
    assert json.loads((fresh.output / "quantflow.json").read_text())["status"] == "complete"
    assert (
        fresh.layers() == layers
        and [(p, p.stat().st_mtime_ns) for p in fresh.store.glob("*/quality.json")] == quality
    )


@pytest.mark.parametrize("gate", ["kl_mean", "kl_p99", "top1", "perplexity_ratio"])
def test_nan_misses_every_gate(fresh: Bench, gate: str) -> None:
    """A head of 3e38 gives logits of infinity: nothing can be said of such a model."""
    tensors = load_file(fresh.model / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 3e38)
    tensors["lm_head.weight"] *= 1e4
    save_file(tensors, fresh.model / "model.safetensors", {"format": "pt"})
    text = run(
        fresh,
        code=3,
        stages=[
            "rtn",
            {"pack": {"format": "awq"}},
            fresh.evaluate(gates={gate: 1.0 if gate == "top1" else 1e9}),
        ],
    )
    assert f"{gate} is " in text


# Disjoint texts


def test_calibration_text_is_not_evaluated_on(fresh: Bench) -> None:
    same = {"data": str(fresh.root / "calib.txt"), "windows": 2, "length": 32}
    text = run(fresh, code=2, stages=[*STAGES, {"evaluate": same}])
    assert "of its documents were used for calibration" in text and "evaluate.skip" in text
    assert not (fresh.root / "out").exists()
    # The same documents in another file, spelt as JSON lines.
    documents = [
        d.strip()
        for d in (fresh.root / "calib.txt").read_text().split("<|endoftext|>")
        if d.strip()
    ]
    (fresh.root / "copy.jsonl").write_text(
        "".join(json.dumps({"text": f" {d} "}) + "\n" for d in documents)
    )
    copy = {"data": str(fresh.root / "copy.jsonl"), "windows": 2, "length": 32}
    assert "used for calibration" in run(fresh, code=2, stages=[*STAGES, {"evaluate": copy}])
    run(fresh, stages=[*STAGES, {"evaluate": {**copy, "skip": 32}}])


# Ranks, put together again by a reading of the formats that is not the product's


def unpack(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Codes of int32 words along the last axis, low bits first; `order`: which of a word's codes
    each field holds."""
    fields = 32 // bits
    raw = words.numpy().view(np.uint32)
    out = np.zeros((*raw.shape, fields), dtype=np.int64)
    for field in range(fields):
        out[..., order[field] if order else field] = (raw >> np.uint32(field * bits)) & np.uint32(
            2**bits - 1
        )
    return out.reshape(*raw.shape[:-1], -1)


def read_module(form: str, tensors: dict[str, Tensor], module: str) -> dict[str, np.ndarray]:
    """`codes [N, K]`, `scales [N, G]`, `zeros [N, G]` of one 4-bit module."""
    if form == "compressed-tensors":
        n, k = tensors[f"{module}.weight_shape"].tolist()
        codes = unpack(tensors[f"{module}.weight_packed"], 4)[:, :k]
        assert codes.shape == (n, k)
        zeros = unpack(tensors[f"{module}.weight_zero_point"].T.contiguous(), 4)[:, :n].T
        return {
            "codes": codes,
            "scales": tensors[f"{module}.weight_scale"].float().numpy(),
            "zeros": zeros,
        }
    scales = tensors[f"{module}.scales"].float().numpy().T
    if form == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        codes, zeros = (
            unpack(tensors[f"{module}.{part}"], 4, order).T for part in ("qweight", "qzeros")
        )
    else:
        codes = unpack(tensors[f"{module}.qweight"].T.contiguous(), 4)
        zeros = unpack(tensors[f"{module}.qzeros"], 4).T
        index = tensors[f"{module}.g_idx"].numpy()
        assert (index == np.arange(len(index)) // (len(index) // scales.shape[1])).all()
    return {"codes": codes, "scales": scales, "zeros": zeros}


@pytest.mark.parametrize("form", FORMATS)
def test_ranks_put_together_are_the_unsharded_tensors(bench: Bench, form: str) -> None:
    whole = load_file(bench.output / form / "model.safetensors")
    ranks = [
        load_file(bench.output / form / "tp2" / f"rank-{r}" / "model.safetensors") for r in range(2)
    ]
    seen: set[str] = set()
    for layer in range(2):
        for linear in (*COLUMN, *ROW):
            module = f"model.layers.{layer}.{'mlp' if linear[0] in 'gud' else 'self_attn'}.{linear}"
            axis = 0 if linear in COLUMN else 1
            expected, parts = (
                read_module(form, whole, module),
                [read_module(form, rank, module) for rank in ranks],
            )
            for what, value in expected.items():
                half = value.shape[axis] // 2
                for rank, part in enumerate(parts):
                    assert (
                        part[what]
                        == (
                            value[rank * half :][:half]
                            if axis == 0
                            else value[:, rank * half :][:, :half]
                        )
                    ).all(), (module, what)
            if "self_attn" in module:
                bias = [rank[f"{module}.bias"] for rank in ranks]
                assert (
                    torch.equal(torch.cat(bias), whole[f"{module}.bias"])
                    if axis == 0
                    else all(torch.equal(b, whole[f"{module}.bias"]) for b in bias)
                )
            seen |= {name for name in whole if name.startswith(f"{module}.")}
    for name in set(whole) - seen:  # embedding, norms, head
        assert all(torch.equal(rank[name], whole[name]) for rank in ranks), name
    assert all(set(rank) == set(whole) for rank in ranks)


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
def test_ranks_have_the_kv_parameters_of_their_heads(fresh: Bench, granularity: str) -> None:
    pack = [{"pack": {"format": "awq"}}, {"shard": {"tp": 2}}]
    base = ["calibrate", "rtn"]
    run(fresh, stages=[*base, {"kv_qparams": {"granularity": "channel"}}, *pack])
    channels = load_file(fresh.output / "kv_qparams.safetensors")
    run(fresh, stages=[*base, {"kv_qparams": {"granularity": granularity}}, *pack])
    ranks = [
        load_file(fresh.output / "tp2" / f"rank-{r}" / "kv_qparams.safetensors") for r in range(2)
    ]
    for layer in range(2):
        for letter in "kv":
            name = f"model.layers.{layer}.self_attn.{letter}"
            scale, zero = channels[f"{name}_scale"], channels[f"{name}_zero_point"]
            assert scale.shape == (2, 16)  # [KV heads, D]
            low, high = zero - scale * 127.5, zero + scale * 127.5
            for rank in range(2):
                own_low, own_high = (low[rank : rank + 1], high[rank : rank + 1])
                if granularity == "tensor":
                    own_low, own_high = own_low.min(), own_high.max()
                elif granularity == "head":
                    own_low, own_high = own_low.min(1).values, own_high.max(1).values
                torch.testing.assert_close(
                    ranks[rank][f"{name}_scale"], (own_high - own_low) / 255, rtol=1e-5, atol=1e-7
                )
                torch.testing.assert_close(
                    ranks[rank][f"{name}_zero_point"],
                    (own_high + own_low) / 2,
                    rtol=1e-5,
                    atol=1e-6,
                )
            if granularity == "tensor":
                assert ranks[0][f"{name}_scale"] != ranks[1][f"{name}_scale"]


# Quality, measured again through transformers


def _windows(tokenizer: Any, path: Path, count: int, length: int) -> list[list[int]]:
    ids: list[int] = []
    for document in path.read_text(encoding="utf-8").split("<|endoftext|>"):
        if document.strip():
            ids += tokenizer.encode(document.strip()).ids
    return [ids[i * length : (i + 1) * length] for i in range(count)]


@torch.no_grad()
def _measure(
    reference: Any, model: Any, windows: list[list[int]], cache: Any = None
) -> dict[str, float]:
    kl, same, nll_a, nll_b = [], [], 0.0, 0.0
    for window in windows:
        x = torch.tensor([window])
        a = reference(x).logits[0].double().log_softmax(-1)
        b = (
            (model(x, past_key_values=cache()) if cache else model(x))
            .logits[0]
            .double()
            .log_softmax(-1)
        )
        kl += (a.exp() * (a - b)).sum(-1).tolist()
        same += (a.argmax(-1) == b.argmax(-1)).tolist()
        nll_a -= a[:-1].gather(1, x[0, 1:, None]).sum().item()
        nll_b -= b[:-1].gather(1, x[0, 1:, None]).sum().item()
    predicted = len(windows) * (len(windows[0]) - 1)
    return {
        "perplexity": math.exp(nll_b / predicted),
        "reference_perplexity": math.exp(nll_a / predicted),
        "kl_mean": sum(kl) / len(kl),
        "kl_p99": sorted(kl)[math.ceil(0.99 * len(kl)) - 1],
        "top1": sum(same) / len(same),
        "tokens": len(kl),
    }


def _rounding_cache(parameters: dict[str, Tensor]) -> Any:
    """A cache that gives back K and V as int8 would: `q = clamp(round((f - zp) / scale))`, `f ≈ q *
    scale + zp`."""
    from transformers import DynamicCache

    class Rounding(DynamicCache):
        def update(self, k: Tensor, v: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
            values = []
            for letter, x in (("k", k), ("v", v)):
                scale, zero = (
                    parameters[f"model.layers.{layer}.self_attn.{letter}_{what}"]
                    for what in ("scale", "zero_point")
                )
                values.append(
                    torch.clamp(torch.round((x - zero) / scale), -128, 127) * scale + zero
                )
            return super().update(values[0], values[1], layer, *args, **kwargs)

    return Rounding


@pytest.mark.parametrize("form", FORMATS)
def test_quality_agrees_with_transformers(bench: Bench, form: str) -> None:
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    def load(tensors: dict[str, Tensor]) -> Any:
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(bench.model)).float()
        model.load_state_dict({n: t.float() for n, t in tensors.items()})
        return model.eval()

    source, packed = (
        load_file(bench.model / "model.safetensors"),
        load_file(bench.output / form / "model.safetensors"),
    )
    restored = {}
    for name in source:
        if name in packed:
            restored[name] = packed[name]
        else:
            found = read_module(form, packed, name.removesuffix(".weight"))
            size = found["codes"].shape[1] // found["scales"].shape[1]
            zeros, scales = (found[what].repeat(size, 1) for what in ("zeros", "scales"))
            restored[name] = torch.from_numpy((found["codes"] - zeros) * scales)
    windows = _windows(
        Tokenizer.from_file(str(bench.model / "tokenizer.json")), bench.root / "eval.txt", 4, 32
    )
    reference, model = load(source), load(restored)
    quality = json.loads((bench.output / "quantflow.json").read_text())["quality"]
    own = load_file(bench.output / "kv_qparams.safetensors")
    statistics = load_file(bench.output / "calibration.safetensors")
    original = {}
    for layer in range(2):
        for letter, what in (("k", "key"), ("v", "value")):
            high, low = (statistics[f"model.layers.{layer}.{what}.{end}"] for end in ("max", "min"))
            original[f"model.layers.{layer}.self_attn.{letter}_scale"] = (
                high.max() - low.min()
            ) / 255
            original[f"model.layers.{layer}.self_attn.{letter}_zero_point"] = (
                high.max() + low.min()
            ) / 2
    cases = {
        "weights": (model, None),
        "kv": (reference, _rounding_cache(original)),
        "weights_and_kv": (model, _rounding_cache(own)),
    }
    assert set(quality) == set(cases)
    for name, (judged, cache) in cases.items():
        expected = _measure(reference, judged, windows, cache)
        # A K or V at the middle of two codes may round either way.
        loose = 0.02 if cache else 1e-3
        for key, value in expected.items():
            slack = 1 / len(windows[0]) / len(windows) * 1.01 if key == "top1" and cache else 0.0
            assert quality[name][key] == pytest.approx(
                value, rel=loose if key.startswith("kl") else 1e-4, abs=slack + 1e-7
            ), (name, key)
    assert quality["weights"]["kl_mean"] > 1e-5


def test_eval_gives_the_runs_figures(bench: Bench) -> None:
    quality = json.loads((bench.output / "quantflow.json").read_text())["quality"]["weights"]
    for form in FORMATS:
        result = invoke(
            "eval",
            bench.output / form,
            "--reference",
            bench.model,
            "--data",
            bench.root / "eval.txt",
            "--windows",
            4,
            "--length",
            32,
            "--json",
        )
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout) == pytest.approx(quality), form


def test_rtn_alone_needs_no_text(fresh: Bench) -> None:
    for name in ("calib.txt", "eval.txt"):
        os.remove(fresh.root / name)
    run(fresh, stages=["rtn", {"pack": {"format": "awq"}}], calibration=None)
    assert {p.name for p in fresh.output.iterdir()} >= {
        "model.safetensors",
        "quantflow.json",
        "report.json",
        "run.json",
    }
