"""A quantised checkpoint in another format: the same codes, scales and zero points, or none at
all."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantflow.errors import FormatError, ModelError, OutputError
from quantflow.formats import FORMATS
from quantflow.formats.base import ConfigRequest, Format
from quantflow.formats.reader import Weights
from quantflow.formats.weight import Weight
from quantflow.pipeline.export import Options, export
from quantflow.quant.numbers.integer import IntegerTensor
from quantflow.quant.scheme import Scheme
from quantflow.stages.pack import Pack
from quantflow.tokenizers.load import load_tokenizer
from tests.formats.helpers import random_tensor
from tests.helpers.runs import UNLIKE, Bench, contents, invoke, make_bench

ROOT = Path(__file__).parents[2]
EVERY = ("compressed-tensors", "awq", "gptq", "gptq_v2", "bitblas", "gguf")


def made(root: Path, pack: str, stages: list[Any], **changes: Any) -> Bench:
    bench = make_bench(root, intermediate_size=128)
    result = invoke(
        "run",
        bench.recipe(
            stages=[*stages, {"pack": {"format": pack}}, *changes.pop("after", [])], **changes
        ),
    )
    assert result.exit_code == 0, result.output
    return bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Four bits, symmetric, with KV parameters by head: what every format holds."""
    stages = ["calibrate", "gptq", {"kv_qparams": {"granularity": "head"}}]
    weights = {"bits": 4, "group_size": 32, "symmetric": True}
    return made(
        tmp_path_factory.mktemp("export"),
        "compressed-tensors",
        stages,
        weights=weights,
        after=[{"shard": {"tp": 2}}],
    )


def tensors(folder: Path) -> dict[str, Any]:
    """Everything that a checkpoint says, by native names."""
    weights = Weights(folder)
    found: dict[str, Any] = {}
    for name in weights.checkpoint.expected:
        if weights.is_quantised(name):
            q = weights.quantized(name.removesuffix(".weight"))
            found[name] = (q.scheme, q.codes, q.scales.double(), q.zeros, q.group_index)
        else:
            found[name] = weights.tensor(name)
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert set(a) == set(b)
    different = [name for name in a if not same(a[name], b[name])]
    assert not different


@pytest.mark.parametrize(
    ("first", "second"), [pair for pair in product(EVERY, EVERY) if pair[0] != pair[1]]
)
def test_there_and_back_is_the_same(bench: Bench, tmp_path: Path, first: str, second: str) -> None:
    one, two, back = (tmp_path / name for name in ("one", "two", "back"))
    export(bench.output, first, one)
    done = export(one, second, two)
    assert (done.source_format, done.format, done.modules) == (first, second, 14)
    assert_same(tensors(one), tensors(bench.output))
    assert_same(tensors(two), tensors(bench.output))
    export(two, first, back)
    # bit for bit, configuration and tokenizer too
    assert contents(back, UNLIKE) == contents(one, UNLIKE)
    assert (two / "kv_qparams.safetensors").read_bytes() == (
        bench.output / "kv_qparams.safetensors"
    ).read_bytes()


def test_what_is_exported_is_what_a_run_packs(bench: Bench, tmp_path: Path) -> None:
    """Ranks and whole, byte for byte; and their KV parameters."""
    export(bench.output, "compressed-tensors", tmp_path / "out", Options(tp=2))
    ours, theirs = contents(tmp_path / "out", UNLIKE), contents(bench.output, UNLIKE)
    shared = set(ours) & set(theirs)
    assert {
        "model.safetensors",
        "config.json",
        "tp2/rank-0/model.safetensors",
        "tp2/rank-1/kv_qparams.safetensors",
    } <= shared
    assert set(ours) == shared
    assert [name for name in shared if ours[name] != theirs[name]] == []


@pytest.mark.parametrize("name", ["awq", "gguf", "gptq"])
def test_the_engine_runs_it(bench: Bench, tmp_path: Path, name: str) -> None:
    from quantflow import LLM, SamplingParams

    params = SamplingParams(max_tokens=12, logprobs=0)
    expected = LLM(bench.output, device="cpu").generate("The cat", params)[0].completions
    export(bench.output, name, tmp_path / "out")
    llm = LLM(tmp_path / "out", device="cpu")
    assert (
        llm.generate("The cat", params)[0].completions == expected
        and "int8" in llm.engine.describe()["KV cache"]
    )


def test_an_act_order_index_goes_where_it_can(tmp_path: Path) -> None:
    stages = ["calibrate", {"gptq": {"act_order": "dynamic"}}]
    bench = made(
        tmp_path, "gptq_v2", stages, weights={"bits": 4, "group_size": 32, "symmetric": True}
    )
    export(bench.output, "gptq", tmp_path / "v1")
    assert_same(tensors(tmp_path / "v1"), tensors(bench.output))
    assert any(
        value[4] is not None
        for value in tensors(tmp_path / "v1").values()
        if isinstance(value, tuple)
    )
    for name in ("awq", "compressed-tensors"):
        with pytest.raises(FormatError, match="group index") as refused:
            export(bench.output, name, tmp_path / "no")
        assert "q_proj and 13 more" in str(refused.value)  # all at once
        assert not (tmp_path / "no").exists() and not list(tmp_path.glob(".no*"))


def test_mixed_bits(tmp_path: Path) -> None:
    weights = {
        "bits": 4,
        "group_size": 32,
        "symmetric": True,
        "overrides": [{"match": "*.down_proj", "bits": 8}],
    }
    bench = made(tmp_path, "compressed-tensors", ["rtn"], weights=weights)
    export(bench.output, "gptq_v2", tmp_path / "v2")
    assert_same(tensors(tmp_path / "v2"), tensors(bench.output))
    with pytest.raises(FormatError) as refused:
        export(bench.output, "awq", tmp_path / "no")
    said = str(refused.value)
    assert "8 bits" in said and "several schemes (W4 g32 symmetric, W8 g32 symmetric)" in said


def test_a_zero_point_that_the_first_gptq_cannot_say(tmp_path: Path) -> None:
    """It is known when the tensor is read: nothing of the checkpoint stays then."""
    bench = made(
        tmp_path, "gptq_v2", ["rtn"], weights={"bits": 2, "group_size": 16, "symmetric": False}
    )
    zeros = [value[3] for value in tensors(bench.output).values() if isinstance(value, tuple)]
    assert any(bool((z == 0).any()) for z in zeros)
    result = invoke("export", bench.output, "--format", "gptq", "--output", tmp_path / "no")
    assert result.exit_code == 2 and "zero point" in result.output
    assert not (tmp_path / "no").exists() and not list(tmp_path.glob(".no*"))


def test_what_is_wrong_is_said(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="one of compressed-tensors"):
        export(bench.output, "gguf2", tmp_path / "no")
    with pytest.raises(FormatError, match="quantflow run quantises"):
        export(bench.model, "awq", tmp_path / "no")
    with pytest.raises(OutputError, match="the source itself"):
        export(bench.output, "awq", bench.output)
    with pytest.raises(ModelError):
        export(tmp_path / "nothing", "awq", tmp_path / "no")
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    with pytest.raises(OutputError, match="other content"):
        export(bench.output, "awq", other)
    assert [p.name for p in other.iterdir()] == ["letter.txt"] and not (tmp_path / "no").exists()
    with pytest.raises(FormatError, match="tp = 3"):
        export(bench.output, "awq", tmp_path / "no", Options(tp=3))


def test_files_of_a_size(bench: Bench, tmp_path: Path) -> None:
    done = invoke(
        "export",
        bench.output,
        "--format",
        "awq",
        "--output",
        tmp_path / "parts",
        "--max-shard-size",
        "40000",
    )
    assert done.exit_code == 0, done.output
    files = sorted((tmp_path / "parts").glob("model-*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    held = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == dict(sorted(held.items()))
    assert_same(tensors(tmp_path / "parts"), tensors(bench.output))
    for wrong in ("5", "5XB", "-1"):
        result = invoke(
            "export",
            bench.output,
            "--format",
            "awq",
            "--output",
            tmp_path / "no",
            "--max-shard-size",
            wrong,
        )
        assert result.exit_code == 2 and "--max-shard-size" in result.output


def test_the_commands(bench: Bench, tmp_path: Path) -> None:
    result = invoke(
        "export", bench.output, "--format", "awq", "--output", tmp_path / "out", "--json"
    )
    assert result.exit_code == 0 and json.loads(result.stdout)["to"] == "awq"
    assert json.loads(invoke("formats", "--json").stdout)["awq"]["bits"] == [4]
    assert "compressed-tensors" in invoke("formats").stdout


def test_the_table_says_what_the_formats_do() -> None:
    assert set(FORMATS) == set(get_args(Pack.model_fields["format"].annotation))
    for name, form in FORMATS.items():
        ability = form.ability

        def holds(scheme: Scheme, index: bool = False, form: Format = form) -> bool:
            return not form.check(Weight("m", (256, 256), scheme, index))

        assert (
            tuple(bits for bits in range(2, 9) if holds(Scheme(bits, 32, True))) == ability.bits
        ), name
        assert holds(Scheme(4, 64, True, "nf4")) == ("NF4" in ability.grid or "any" in ability.grid)
        assert holds(Scheme(4, 32, False, "minimum")) == (
            "minimums" in ability.grid or "any" in ability.grid
        )
        main = Scheme(4, 64, True, "integer" if ability.bits else "nf4")
        if main.kind == "integer":
            assert holds(main, index=True) == (ability.act_order_index == "yes") == form.holds_index
        assert form.parallel == ability.tensor_parallel.startswith("yes")
        assert holds(Scheme(4, 64, False)) == (ability.asymmetric != "no")
        assert form.shares_scheme("m") == (ability.mixed_bits == "no")


def test_the_readmes_table_says_the_same() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text[text.index("## Formats") : text.index("## Run it")].splitlines()
    rows = {
        row[0].split("`")[1]: row[1:]
        for line in lines
        if line.startswith("| `")
        for row in [[c.strip() for c in line[1:-1].split("|")]]
    }
    assert set(rows) == set(FORMATS)
    for name, (_, groups, asymmetric, mixed, index, kv, ranks, _) in rows.items():
        ability = FORMATS[name].ability
        assert (
            mixed.replace("`dynamic`", "yes") == ability.mixed_bits
            and index == ability.act_order_index
        ), name
        assert (
            ranks in ability.tensor_parallel
            and kv.split(",")[0] in ability.kv_scales
            and ("fp8" in kv) == ("fp8" in ability.kv_scales) == bool(FORMATS[name].kv_scales)
        ), name
        assert groups.split(",")[0] in ability.groups and (asymmetric in ("–", "")) == (
            ability.asymmetric == "no"
        ), name


def rewritten(folder: Path, change: Any) -> None:
    """The checkpoint's tensors, changed, in one file."""
    file = folder / "model.safetensors"
    found = load_file(file)
    change(found)
    save_file(found, file, {"format": "pt"})


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in tensors if n.endswith(".qzeros"))
    tensors[name] = tensors[name][:, :-1].contiguous()


def floating(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in tensors if n.endswith(".qweight"))
    tensors[name] = tensors[name].float()


def infinite(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in tensors if n.endswith(".scales"))
    tensors[name][0, 0] = torch.inf


def absurd_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes((2**60).to_bytes(8, "little") + file.read_bytes()[8:])


def outside(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../../model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        absurd_header,
        outside,
        lambda f: rewritten(f, narrow),
        lambda f: rewritten(f, floating),
        lambda f: rewritten(f, infinite),
    ],
    ids=["cut", "absurd_header", "outside", "narrow_zeros", "floating_codes", "infinite_scale"],
)
def test_a_damaged_checkpoint_is_refused_and_leaves_nothing(
    bench: Bench, tmp_path: Path, damage: Any
) -> None:
    export(bench.output, "gptq_v2", tmp_path / "source")
    damage(tmp_path / "source")
    result = invoke("export", tmp_path / "source", "--format", "awq", "--output", tmp_path / "out")
    assert result.exit_code == 2 and "internal error" not in result.output, result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def uneven_index(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in tensors if n.endswith(".g_idx"))
    tensors[name][0] = 2**20


def negative_index(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in tensors if n.endswith(".g_idx"))
    tensors[name][0] = -1


def long_words(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in tensors if n.endswith(".qweight"))
    tensors[name] = tensors[name].long()


def tall(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in tensors if n.endswith(".qweight"))
    tensors[name] = torch.cat([tensors[name]] * 2)


@pytest.mark.parametrize("change", [uneven_index, negative_index, long_words, tall])
def test_tensors_that_do_not_fit_are_named(bench: Bench, tmp_path: Path, change: Any) -> None:
    export(bench.output, "gptq", tmp_path / "source")
    rewritten(tmp_path / "source", change)
    result = invoke(
        "export",
        tmp_path / "source",
        "--format",
        "compressed-tensors",
        "--output",
        tmp_path / "out",
    )
    assert (
        result.exit_code == 2 and "_proj" in result.output and "internal error" not in result.output
    ), result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_links_that_lead_out_are_refused(bench: Bench, tmp_path: Path) -> None:
    """A checkpoint that somebody sent may not name files of the reader's. The hub's cache, which is
    made of links, is another matter."""
    export(bench.output, "gptq_v2", tmp_path / "source")
    weights = tmp_path / "source" / "model.safetensors"
    elsewhere = tmp_path / "elsewhere.safetensors"
    weights.rename(elsewhere)
    weights.symlink_to(elsewhere)
    result = invoke("export", tmp_path / "source", "--format", "awq", "--output", tmp_path / "out")
    assert (
        result.exit_code == 2
        and "leads out of the directory" in result.output
        and not (tmp_path / "out").exists()
    )
    hub = tmp_path / "hub" / "snapshots" / "abc"
    (tmp_path / "hub" / "blobs").mkdir(parents=True)
    hub.mkdir(parents=True)
    for file in (tmp_path / "source").iterdir():
        blob = tmp_path / "hub" / "blobs" / f"{file.name}-hash"
        blob.write_bytes(file.read_bytes())
        (hub / file.name).symlink_to(Path("../../blobs") / blob.name)
    export(hub, "awq", tmp_path / "out")
    # a directory that is itself a link is the user's own doing
    (tmp_path / "whole").symlink_to(tmp_path / "out")
    export(tmp_path / "whole", "gptq", tmp_path / "again")
    assert_same(tensors(tmp_path / "again"), tensors(bench.output))


def small_demo(root: Path) -> Path:
    """The demo recipe's artifact, from less text."""
    fewer = [
        "calibration.samples=8",
        "calibration.seqlen=128",
        "stages.evaluate.windows=1",
        "stages.evaluate.length=32",
    ]
    fewer += ["stages.evaluate.gates.kl_mean=null", "stages.evaluate.gates.top1=null"]
    result = invoke(
        "run",
        ROOT / "recipes/demo_w4_kv8.yaml",
        "--output",
        root / "artifact",
        *(a for f in fewer for a in ("--set", f)),
    )
    assert result.exit_code == 0, result.output
    return root / "artifact"


@pytest.mark.slow
def test_the_demo_artifact_in_every_format(tmp_path: Path) -> None:
    """To every format that holds it exactly; refused with the reason by the rest, where
    --requantize takes it, and says how far off."""
    artifact = small_demo(tmp_path)
    original = tensors(artifact)
    embedding = original["model.embed_tokens.weight"]
    inexact = int((embedding.half().float() != embedding.float()).sum())
    refusals = {
        "bitsandbytes": (
            "model.layers.0.self_attn.q_proj and 55 more: W4 g128 asymmetric, a grid with integer"
            " zero points"
        ),
        "turbomind": f"model.embed_tokens.weight: {inexact} of {embedding.numel()} values",
        "gguf": r"proj: \d+ of \d+ minimums \(-zero \* scale\) are no exact float16",
    }
    # NF4 of 4 bits; rounding 37 numbers; fp16's half unit
    worst = {"bitsandbytes": 0.12, "turbomind": 1e-6, "gguf": 2**-11}
    zero = any(
        bool((value[3] == 0).any()) for value in original.values() if isinstance(value, tuple)
    )
    if zero:
        refusals["gptq"] = "zero points are 0"
        worst["gptq"] = 0.05
    for name in FORMATS:
        out = tmp_path / name
        if name in refusals:
            with pytest.raises(FormatError, match=refusals[name]):
                export(artifact, name, out)
            assert not out.exists()
        done = export(artifact, name, out, Options(requantize=name in refusals))
        assert done.modules == 56 and bool(done.errors) == (name in refusals)
        here = Weights(out)
        if name not in refusals and name != "huggingface":
            assert_same(tensors(out), original)
        for module in ("model.layers.0.self_attn.q_proj", "model.layers.7.mlp.down_proj"):
            before, after = (
                w.tensor(f"{module}.weight").double() for w in (Weights(artifact), here)
            )
            error = float((after - before).norm() / before.norm())
            if name not in refusals:
                assert error == 0, name
            elif module in done.errors:
                assert (
                    done.errors[module] == pytest.approx(error, rel=1e-3)
                    and 0 < error < worst[name]
                ), (name, error)
        assert max(done.errors.values(), default=0) < worst.get(name, 1)
        assert (
            json.loads((out / "requantized.json").read_text())["relative_errors"]
            == dict(done.errors)
            if done.errors
            else True
        )
        assert (
            here.checkpoint.config.tied
            and load_tokenizer(here.checkpoint.tokenizer_path).encode("SELECT 1").ids
        )
        kv = (
            here.kv_parameters()
            if name == "turbomind"
            else load_file(out / "kv_qparams.safetensors")
        )
        assert same_tensors(kv, load_file(artifact / "kv_qparams.safetensors"))


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_half_precision_workspaces_by_rank(tmp_path: Path) -> None:
    """int4 in a float16 model is exact; two ranks put together again are the whole; KV parameters
    go along."""
    config = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "dtype": torch.float16,
    }
    bench = make_bench(tmp_path / "bench", **config)
    recipe = bench.recipe(
        stages=[
            "calibrate",
            "rtn",
            "kv_qparams",
            {"pack": {"format": "awq"}},
            {"pack": {"format": "turbomind"}},
            {"shard": {"tp": 2}},
        ],
        weights={"bits": 4, "group_size": 64, "symmetric": False},
    )
    result = invoke("run", recipe)
    assert result.exit_code == 0, result.output
    awq, workspace = bench.output / "awq", bench.output / "turbomind"
    assert_same(tensors(workspace), tensors(awq))
    names = {p.name for p in (workspace / "triton_models/weights").iterdir()}
    assert {
        "layers.0.attention.w_qkv.1.qweight",
        "layers.1.past_kv_scale.1.weight",
        "config.ini",
    } <= names
    from quantflow import LLM, SamplingParams

    one, two = (
        LLM(folder, device="cpu", kv="full").generate("The cat", SamplingParams(max_tokens=8))[0]
        for folder in (awq, workspace)
    )
    assert one.completions == two.completions
    export(workspace, "gptq_v2", tmp_path / "back", Options(tp=2))
    assert_same(tensors(tmp_path / "back"), tensors(awq))
    export(awq, "turbomind", tmp_path / "again", Options(tp=2))
    ours, theirs = contents(tmp_path / "again", UNLIKE), contents(workspace, UNLIKE)
    # A run takes each rank's own extremes; an export has the layer's alone, and gives them to both.
    assert {n for n in theirs if ours.get(n) != theirs[n]} <= {
        n for n in theirs if "past_kv_scale" in n
    } and set(ours) == set(theirs)

    # As an older QuantFlow wrote it: zero points without the kernel's 64.
    for grid in (workspace / "triton_models/weights").glob("*.scales_zeros"):
        pairs = np.fromfile(grid, "<f2").reshape(-1, 2)
        assert pairs[:, 0].min() >= 64
        pairs[:, 0] -= 64
        pairs.tofile(grid)
    assert (
        "zero points as z" in json.loads(invoke("inspect", workspace, "--json").output)["notes"][0]
    )
    said = invoke(
        "export", workspace, "--format", "turbomind", "--output", tmp_path / "mended", "--tp", 2
    ).output
    assert "Note: all scales_zeros files hold zero points as z" in " ".join(said.split())
    assert_same(tensors(tmp_path / "mended"), tensors(awq))
    assert json.loads(invoke("inspect", tmp_path / "mended", "--json").output)["notes"] == []


def test_kv_parameters_that_a_workspace_has_no_place_for(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="one scale for each layer and rank"):
        export(bench.output, "turbomind", tmp_path / "no", Options(requantize=False))


@pytest.mark.parametrize(
    "settings", [{}, {"granularity": "head"}, {"granularity": "channel", "symmetric": True}]
)
def test_fp8_scales_of_the_cache_inside_the_checkpoint(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """The least bfloat16 that takes the largest magnitude to 448, whatever int8 parameters the
    recipe asked for: by a run, from what was seen, and by an export, from those."""
    stages = [
        "calibrate",
        "rtn",
        {"kv_qparams": settings},
        {"pack": {"format": "compressed-tensors", "kv_scales": "fp8"}},
    ]
    bench = make_bench(tmp_path, intermediate_size=128)
    result = invoke(
        "run", bench.recipe(stages=stages, weights={"bits": 4, "group_size": 32, "symmetric": True})
    )
    assert result.exit_code == 0, result.output
    inside = load_file(bench.output / "model.safetensors")
    report = json.loads((bench.output / "report.json").read_text())["kv"]
    for layer in range(2):
        for letter, name in (("k", "key"), ("v", "value")):
            largest = max(abs(end) for side in ("low", "high") for end in report[name][side][layer])
            scale = inside[f"model.layers.{layer}.self_attn.{letter}_scale"]
            assert scale.shape == (1,) and scale.dtype == torch.bfloat16
            below = torch.nextafter(scale, torch.zeros_like(scale))
            # the report has four digits
            assert float(below) * 448 < largest * 1.0005 and float(scale) * 448 > largest * 0.9995
    export(bench.output, "compressed-tensors", tmp_path / "same", Options(kv_scales="fp8"))
    assert (
        contents(tmp_path / "same")["model.safetensors"]
        == contents(bench.output)["model.safetensors"]
    )
    done = export(bench.output, "compressed-tensors", tmp_path / "without")
    assert "--kv-scales fp8 keeps them" in done.notes[-1]
    assert (
        json.loads((tmp_path / "without/config.json").read_text())["quantization_config"][
            "kv_cache_scheme"
        ]
        is None
    )
    export(tmp_path / "without", "compressed-tensors", tmp_path / "anew", Options(kv_scales="fp8"))
    for name, scale in load_file(tmp_path / "anew" / "model.safetensors").items():
        assert torch.equal(scale, inside[name]), name


def test_an_fp8_cache_is_not_taken_for_another(tmp_path: Path) -> None:
    from quantflow import LLM

    kv = {"kv_qparams": {"symmetric": True}}
    bench = made(
        tmp_path,
        "compressed-tensors",
        ["calibrate", "rtn", kv],
        weights={"bits": 4, "group_size": 32, "symmetric": True},
    )
    export(bench.output, "compressed-tensors", tmp_path / "in", Options(kv_scales="fp8"))
    (tmp_path / "in" / "kv_qparams.safetensors").unlink()  # as others' have none
    assert Weights(tmp_path / "in").kv_parameters() == {}
    said = LLM(tmp_path / "in", device="cpu").engine.describe()["KV cache"]
    assert said.startswith("full precision (the checkpoint's own scales, fp8, are not used)")
    assert (
        "(fp8): the engine here has no such cache"
        in json.loads(invoke("inspect", tmp_path / "in", "--json").output)["notes"][0]
    )
    # with nothing but themselves to go by
    export(tmp_path / "in", "compressed-tensors", tmp_path / "moved", Options(kv_scales="fp8"))
    assert contents(tmp_path / "moved", UNLIKE) == contents(tmp_path / "in", UNLIKE)
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    # as QuantFlow once wrote, in other numbers
    config["quantization_config"]["kv_cache_scheme"]["type"] = "int"
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    assert "int8, calibrated" in LLM(tmp_path / "in", device="cpu").engine.describe()["KV cache"]
    export(bench.output, "gptq", tmp_path / "bare")
    (tmp_path / "bare" / "kv_qparams.safetensors").unlink()
    with pytest.raises(FormatError, match="no KV-cache parameters in the source"):
        export(tmp_path / "bare", "compressed-tensors", tmp_path / "no", Options(kv_scales="fp8"))
    for name, kind in (("awq", "fp8"), ("compressed-tensors", "true")):
        result = invoke(
            "export",
            bench.output,
            "--format",
            name,
            "--kv-scales",
            kind,
            "--output",
            tmp_path / "no",
        )
        assert (
            result.exit_code == 2
            and "--kv-scales fp8 with --format compressed-tensors"
            in " ".join(result.output.split())
        )


def test_plain_checkpoints(bench: Bench, tmp_path: Path) -> None:
    export(bench.output, "huggingface", tmp_path / "exact")
    exact, original = Weights(tmp_path / "exact"), Weights(bench.output)
    assert exact.format is None
    for name in original.checkpoint.expected:
        assert torch.equal(exact.tensor(name).float(), original.tensor(name).float()), name
    with pytest.raises(FormatError, match="no exact bfloat16"):
        export(bench.output, "huggingface", tmp_path / "no", Options(dtype="bfloat16"))
    done = export(
        bench.output,
        "huggingface",
        tmp_path / "rounded",
        Options(dtype="bfloat16", requantize=True),
    )
    assert (
        0 < max(done.errors.values()) < 2**-8
        and "bfloat16" in (tmp_path / "rounded" / "config.json").read_text()
    )
    with pytest.raises(FormatError, match="--format huggingface"):
        export(bench.output, "awq", tmp_path / "no", Options(dtype="bfloat16"))
    # The other way: a plain checkpoint is rounded to nearest where that is asked for.
    done = export(tmp_path / "exact", "gptq_v2", tmp_path / "again", Options(requantize=True))
    assert (
        done.source_format == "huggingface"
        and done.modules == 14
        and 0 < max(done.errors.values()) < 0.2
    )
    assert Weights(tmp_path / "again").scheme_of("model.layers.0.self_attn.q_proj") is not None
    export(bench.model, "gguf", tmp_path / "plain_gguf")
    assert_same(tensors(tmp_path / "plain_gguf"), tensors(bench.model))


def test_nothing_but_what_is_known_is_carried_over(bench: Bench, tmp_path: Path) -> None:
    export(bench.output, "gptq", tmp_path / "source")
    (tmp_path / "source" / "modeling_evil.py").write_text("raise SystemExit('ran')")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    (tmp_path / "source" / "generation_config.json").write_text(
        json.dumps({"temperature": 0.5, "eos_token_id": 1})
    )
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("awq", "gguf", "huggingface"):
        export(tmp_path / "source", name, tmp_path / name)
        files = {p.name for p in (tmp_path / name).iterdir()}
        assert (
            "modeling_evil.py" not in files
            and {"generation_config.json", "chat_template.jinja", "tokenizer.json"} <= files
        )
        assert (
            json.loads((tmp_path / name / "generation_config.json").read_text())["temperature"]
            == 0.5
        )
        if name != "gguf":
            assert "auto_map" not in (tmp_path / name / "config.json").read_text()


CHAINS = st.lists(
    st.sampled_from(("compressed-tensors", "awq", "gptq", "gptq_v2", "gguf", "turbomind")),
    min_size=2,
    max_size=5,
)


@settings(deadline=None, max_examples=150)
@given(
    CHAINS,
    st.integers(2, 8),
    st.sampled_from((-1, 32, 64)),
    st.booleans(),
    st.booleans(),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(0, 1000),
)
def test_any_chain_of_formats_is_exact_or_refused(
    chain: list[str], bits: int, group: int, symmetric: bool, index: bool, n: int, k: int, seed: int
) -> None:
    scheme = Scheme(bits, group, symmetric)
    shape = (32 * n, 64 * k)
    first = tensor = random_tensor(
        *shape, scheme, seed=seed, index=index and scheme.groups(shape[1]) > 1, smallest_zero=1
    )
    for name in chain:
        form = FORMATS[name]
        has_index = tensor.group_index is not None
        try:
            encoded = form.encode("m", tensor, torch.float16)
        except FormatError:
            minimums = -tensor.zeros.double() * tensor.scales.double()
            inexact = (
                name == "gguf"
                and not symmetric
                and bool((minimums.half().double() != minimums).any())
            )
            assert inexact or form.check(Weight("m", shape, scheme, has_index))
            continue
        decoded = form.decode(
            "m",
            encoded,
            form.quantization_config(ConfigRequest({"m": scheme}, [], scheme, act_order=has_index)),
        )
        assert isinstance(decoded, IntegerTensor)
        # AWQ's config does not tell symmetric from asymmetric
        tensor = replace(decoded, scheme=scheme)
    assert same(
        (first.codes, first.scales, first.zeros, first.group_index),
        (tensor.codes, tensor.scales, tensor.zeros, tensor.group_index),
    )


# The manifest


def test_an_export_has_a_manifest_that_verify_and_compare_take(tmp_path: Path) -> None:
    """Of an exact translation, the figures that its source was measured by; of files, their
    hashes."""
    bench = make_bench(tmp_path / "made")
    made = bench.recipe(
        stages=["rtn", {"pack": {"format": "compressed-tensors"}}, bench.evaluate()]
    )
    assert invoke("run", made).exit_code == 0
    before = json.loads((bench.output / "quantflow.json").read_text())
    assert (
        invoke(
            "export", bench.output, "--format", "huggingface", "--output", tmp_path / "plain"
        ).exit_code
        == 0
    )
    manifest = json.loads((tmp_path / "plain" / "quantflow.json").read_text())
    assert (manifest["kind"], manifest["name"], manifest["formats"]) == (
        "export",
        "tiny_huggingface",
        {"huggingface": "."},
    )
    assert (
        manifest["source"]["format"] == "compressed-tensors"
        and manifest["source"]["artifact"] == before["fingerprint"]
    )
    assert (
        manifest["source"]["weights"] == before["source"]["weights"]
        and manifest["quality"] == before["quality"]
    )
    for name, entry in manifest["files"].items():
        data = (tmp_path / "plain" / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert {*manifest["files"], "quantflow.json"} == {
        p.name for p in (tmp_path / "plain").iterdir()
    }

    verified = invoke("verify", tmp_path / "plain", "--device", "cpu", "--json")
    assert verified.exit_code == 0 and json.loads(verified.stdout)[0]["passed"] is True
    compared = invoke(
        "compare", bench.output, tmp_path / "plain", "--json", "--output", tmp_path / "page.html"
    )
    assert compared.exit_code == 0, compared.stderr
    found = json.loads(compared.stdout)
    assert [row["quality"] for row in found["artifacts"]] == [
        before["quality"]["weights"]
    ] * 2 and not found["notes"]
    # the recipe is the same
    assert {path.partition(".")[0] for path in found["differences"]} == {"export"}
    assert found["artifacts"][1]["bytes"] == sum(
        t.nbytes for t in load_file(tmp_path / "plain" / "model.safetensors").values()
    )

    with open(tmp_path / "plain" / "config.json", "a") as file:
        file.write(" ")
    changed = invoke("verify", tmp_path / "plain", "--device", "cpu", "--json")
    assert changed.exit_code == 3 and "config.json differs from its sha256" in changed.stderr


def test_what_was_rounded_again_has_no_figures_of_its_source(tmp_path: Path) -> None:
    bench = make_bench(tmp_path / "made")
    made = bench.recipe(
        stages=["rtn", {"pack": {"format": "compressed-tensors"}}, bench.evaluate()]
    )
    assert invoke("run", made).exit_code == 0
    done = invoke(
        "export",
        bench.output,
        "--format",
        "huggingface",
        "--dtype",
        "float16",
        "--requantize",
        "--output",
        tmp_path / "half",
    )
    assert done.exit_code == 0 and (tmp_path / "half" / "requantized.json").is_file()
    manifest = json.loads((tmp_path / "half" / "quantflow.json").read_text())
    assert manifest["quality"] == {} and manifest["source"]["exact"] is False
    assert (
        invoke(
            "export",
            tmp_path / "half",
            "--format",
            "huggingface",
            "--dtype",
            "float16",
            "--output",
            tmp_path / "on",
        ).exit_code
        == 0
    )
    # an inexact source stays one
    assert json.loads((tmp_path / "on" / "quantflow.json").read_text())["source"]["exact"] is False
    shown = invoke("inspect", tmp_path / "half")
    assert shown.exit_code == 0 and "exported from" in shown.stdout


def test_the_export_of_a_foreign_model_is_not_replaced_by_a_run(tmp_path: Path) -> None:
    bench = make_bench(tmp_path / "made")
    assert (
        invoke("export", bench.model, "--format", "huggingface", "--output", bench.output).exit_code
        == 0
    )
    manifest = json.loads((bench.output / "quantflow.json").read_text())
    assert (
        manifest["source"]["artifact"] is None
        and manifest["quality"] == {}
        and manifest["name"] == "model_huggingface"
    )
    refused = invoke("run", bench.recipe())
    assert refused.exit_code == 2 and "`quantflow export` wrote" in refused.stderr
    assert invoke("inspect", bench.output).exit_code == 0
