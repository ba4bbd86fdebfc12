"""The stage `nf4` from a recipe to what transformers and bitsandbytes load, what they write back,
and what the engine makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantflow.errors import RecipeError
from quantflow.formats.reader import Weights
from quantflow.pipeline.export import Options, export
from quantflow.quant.numbers.nf4 import quantize_nf4
from quantflow.quant.scheme import Scheme
from quantflow.stages.registry import load_recipe
from tests.helpers import specimens, zoo
from tests.helpers.runs import Bench, invoke, make_bench
from tests.helpers.tiny import write_text

PACK: dict[str, Any] = {"pack": {"format": "bitsandbytes"}}
DOUBLE: dict[str, Any] = {"nf4": {"double_quant": True}}


def run(bench: Bench, *stages: Any, code: int = 0, **changes: Any) -> str:
    result = invoke("run", bench.recipe(**{"stages": [*stages], "weights": {}, **changes}))
    assert result.exit_code == code and "Traceback" not in result.output, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module", params=[False, True], ids=["single", "double"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The tiny Llama in bfloat16 and its artifact in NF4."""
    bench = make_bench(tmp_path_factory.mktemp("nf4"), intermediate_size=128)
    text = run(
        bench,
        {"nf4": {"double_quant": request.param}},
        PACK,
        bench.evaluate(gates={"kl_mean": 0.05}),
    )
    assert "14 linears quantised, 1 kept" in text and "quantised weights" in text
    return bench


def is_double(bench: Bench) -> bool:
    return bool(
        json.loads((bench.output / "config.json").read_text())["quantization_config"][
            "bnb_4bit_use_double_quant"
        ]
    )


def linears(model: Any) -> dict[str, Any]:
    """bitsandbytes' modules in a transformers model."""
    bnb = pytest.importorskip("bitsandbytes")
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }


def dequantised(module: Any) -> Tensor:
    """By bitsandbytes."""
    functional = pytest.importorskip("bitsandbytes").functional
    return functional.dequantize_4bit(module.weight.data, module.weight.quant_state)


def load(folder: Path, **options: Any) -> Any:
    """transformers' model, which must find every weight and no more."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    return model


# What is written


def test_the_artifact_is_the_rounded_model(bench: Bench) -> None:
    scheme, weights = Scheme(4, 64, True, "nf4", is_double(bench)), Weights(bench.output)
    source = load_file(bench.model / "model.safetensors")
    for name, value in source.items():
        module = name.removesuffix(".weight")
        if module in weights.modules:
            assert weights.scheme_of(module) == scheme
            assert torch.equal(weights.tensor(name), quantize_nf4(value, scheme).dequantize())
        else:
            assert torch.equal(weights.tensor(name), value)
    assert len(weights.modules) == 14
    report = json.loads((bench.output / "report.json").read_text())
    assert report["kept"] == {"lm_head": "weights.ignore"}
    assert all(
        (line["scheme"], line["method"]) == (str(scheme), "nf4")
        for line in report["linears"].values()
    )
    assert all(
        0 < line["weight_error"] < 0.02 and "clip" not in line
        for line in report["linears"].values()
    )


def test_a_second_run_does_nothing_and_other_packs_repeat_no_layer(
    bench: Bench, tmp_path: Path
) -> None:
    nf4 = {"nf4": {"double_quant": is_double(bench)}}
    layers = bench.layers()
    assert len(layers) == 2
    evaluate = bench.evaluate(gates={"kl_mean": 0.05})
    assert "up to date: nothing to do" in run(bench, nf4, PACK, evaluate)
    other = tmp_path / "out" / "artifact"
    other.parent.mkdir()
    (other.parent / ".quantflow-store").symlink_to(bench.store)
    run(bench, nf4, PACK, {"pack": {"format": "huggingface"}}, output=str(other))
    assert bench.layers() == layers
    held = [Weights(other / name) for name in ("bitsandbytes", "huggingface")]
    for name in held[0].checkpoint.expected:
        assert torch.equal(held[0].tensor(name), held[1].tensor(name))
    assert (other / "bitsandbytes/model.safetensors").read_bytes() == (
        bench.output / "model.safetensors"
    ).read_bytes()


def test_kv_parameters_lie_beside_it(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, intermediate_size=128)
    run(bench, "calibrate", "nf4", "kv_qparams", PACK, bench.evaluate())
    assert (bench.output / "kv_qparams.safetensors").is_file()


def test_blocks_of_zeros_are_reported(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, intermediate_size=128)
    tensors = load_file(bench.model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][:3] = 0
    save_file(tensors, bench.model / "model.safetensors", {"format": "pt"})
    for stage in ("nf4", DOUBLE):
        run(bench, stage, PACK)
        assert Weights(bench.output).tensor("model.layers.1.mlp.up_proj.weight")[:3].eq(0).all()
        report = json.loads((bench.output / "report.json").read_text())["linears"]
        assert [line["zero_blocks"] for line in report.values() if "zero_blocks" in line] == [3]


# transformers and bitsandbytes


def test_transformers_loads_the_same_weights(bench: Bench) -> None:
    model, weights = load(bench.output), Weights(bench.output)
    found = linears(model)
    assert set(found) == weights.modules and type(model.lm_head) is torch.nn.Linear
    for name, module in found.items():
        assert module.weight.quant_state.nested == is_double(bench)
        assert torch.equal(dequantised(module), weights.quantized(name).dequantize(torch.bfloat16))


def test_transformers_computes_what_the_plain_export_does(bench: Bench, tmp_path: Path) -> None:
    """Bit for bit while bitsandbytes dequantises to the model's dtype. In `eval` mode its CPU
    kernel may take another way, which rounds the scales to bfloat16 as well: nearer than 2%."""
    export(bench.output, "huggingface", tmp_path / "plain")
    plain, model, tokens = (
        load(tmp_path / "plain", dtype=torch.bfloat16),
        load(bench.output),
        zoo.random_tokens(2, 24),
    )
    with torch.inference_mode():
        expected = plain(tokens).logits
        assert torch.equal(model.train()(tokens).logits, expected)
        near = model.eval()(tokens).logits
    assert (near - expected).float().norm() < 0.02 * expected.float().norm()


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_what_transformers_quantises_is_read(
    bench: Bench, tmp_path: Path, double: bool, storage: str
) -> None:
    """And, quantised by us, has the same codes and, where they are not quantised themselves, the
    same scales."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_quant_storage=storage,
    )
    model = load(bench.model, dtype=torch.bfloat16, quantization_config=settings)
    model.save_pretrained(tmp_path / "theirs")
    weights, ours = Weights(tmp_path / "theirs"), Weights(bench.output)
    assert weights.modules == set(linears(model)) == ours.modules
    for name, module in linears(model).items():
        found = weights.quantized(name)
        assert found.scheme == Scheme(4, 64, True, "nf4", double)
        assert torch.equal(found.dequantize(torch.bfloat16), dequantised(module))
        assert torch.equal(found.codes, ours.quantized(name).codes)
        assert double or is_double(bench) or torch.equal(found.scales, ours.quantized(name).scales)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, intermediate_size=128, tie_word_embeddings=True)
    run(bench, DOUBLE, PACK)
    assert "lm_head.weight" not in load_file(bench.output / "model.safetensors")
    model = load(bench.output)
    assert (
        type(model.lm_head) is torch.nn.Linear
        and model.lm_head.weight is model.model.embed_tokens.weight
    )
    assert torch.equal(
        model.lm_head.weight,
        load_file(bench.model / "model.safetensors")["model.embed_tokens.weight"],
    )


# Every architecture


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zoo, with input channels of which there are whole blocks everywhere."""
    for module in (specimens, zoo):
        monkeypatch.setattr(module, "INNER", 128)
    monkeypatch.setattr(zoo, "EXPERT_INNER", 64)
    monkeypatch.setattr(zoo, "QWEN3_HEAD", 32)


def of_the_zoo(root: Path, name: str) -> Bench:
    zoo.write(root / "model", zoo.specimen(name, torch.bfloat16))
    for text in ("calib.txt", "eval.txt"):
        write_text(root / text, 0, 32)
    return Bench(root)


@pytest.mark.parametrize("name", ["internlm2", "qwen", "qwen2", "qwen3", "opt"])
def test_families(wide: None, tmp_path: Path, name: str) -> None:
    """What transformers sees are the native family's linears, whatever the source called them."""
    bench = of_the_zoo(tmp_path, name)
    run(bench, DOUBLE, PACK)
    model, weights = load(bench.output), Weights(bench.output)
    assert set(linears(model)) == weights.modules
    for module, linear in linears(model).items():
        assert torch.equal(
            dequantised(linear), weights.quantized(module).dequantize(torch.bfloat16)
        )


@pytest.mark.parametrize("name", ["mixtral", "mixtral_fused", "qwen3_moe"])
def test_experts_are_refused_and_may_be_ignored(wide: None, tmp_path: Path, name: str) -> None:
    bench = of_the_zoo(tmp_path, name)
    text = run(bench, "nf4", PACK, code=2)
    assert (
        "an expert of a mixture" in text
        and "joins a layer's experts into one tensor" in text
        and not bench.output.exists()
    )
    run(bench, "nf4", PACK, weights={"ignore": ["lm_head", "*.experts.*"]})
    model, weights = load(bench.output), Weights(bench.output)
    assert set(linears(model)) == weights.modules and any(
        "q_proj" in module for module in weights.modules
    )
    with torch.inference_mode():
        assert model(zoo.random_tokens(1, 12)).logits.isfinite().all()


def test_transformers_reads_no_quantised_experts(
    wide: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why they are refused. Should this fail one day, they need not be."""
    from quantflow.formats.bitsandbytes import Bitsandbytes

    monkeypatch.setattr(Bitsandbytes, "check", lambda *arguments, **more: [])
    bench = of_the_zoo(tmp_path, "mixtral")
    run(bench, "nf4", PACK)
    assert len(Weights(bench.output).modules) == 2 * (4 + 4 * 3)  # we read them
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(bench.output)


def test_rows_that_blocks_do_not_fill(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)  # 96 input channels
    text = run(bench, "nf4", PACK, code=2)
    assert (
        "mlp.down_proj (pack bitsandbytes): 96 input channels; expected a multiple of the blocks"
        " of 64" in text
    )
    assert '{match: "*.down_proj", ignore: true}' in text
    # AWQ could hold groups of 48
    for pack in ({"format": "huggingface"}, {"format": "awq", "requantize": True}):
        text = run(bench, "nf4", {"pack": pack}, code=2)
        # nothing was begun
        assert (
            "96 input channels; expected a multiple of the blocks of 64" in text
            and "hash" not in text
        )
    text = run(
        bench,
        "rtn",
        {"pack": {"format": "gguf", "requantize": True}},
        weights={"group_size": 64, "symmetric": True},
        code=2,
    )
    assert "96 input channels; expected a multiple of group_size 64" in text and "hash" not in text
    run(bench, "nf4", PACK, weights={"overrides": [{"match": "*.down_proj", "ignore": True}]})
    assert len(Weights(bench.output).modules) == 12


# The engine


def test_the_engine_runs_it(bench: Bench, tmp_path: Path) -> None:
    """Dequantised at the start, and says so; it then computes what it does from the same numbers in
    bfloat16."""
    from quantflow import LLM, SamplingParams

    params = SamplingParams(max_tokens=12, logprobs=0)
    export(
        bench.output, "huggingface", tmp_path / "plain", Options(requantize=True, dtype="bfloat16")
    )
    llm, plain = LLM(bench.output, device="cpu"), LLM(tmp_path / "plain", device="cpu")
    scheme = "NF4 g64 double" if is_double(bench) else "NF4 g64"
    assert f"({scheme} has no kernel: dequantised at the start)" in llm.engine.describe()["linears"]
    assert "dequantised" not in plain.engine.describe()["linears"]
    for prompt in ("The cat", "The old whale sleeps"):
        assert (
            llm.generate(prompt, params)[0].completions
            == plain.generate(prompt, params)[0].completions
        )


# Recipes


def wrong(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """Each problem as `line: found; expected …`."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return [str(problem).removeprefix(f"{path}:") for problem in caught.value.problems]


NF4 = (
    "name: x\ncalibration: {data: demo}\nweights: {ignore: [lm_head]}\nstages:\n- nf4\n- pack:"
    " {format: bitsandbytes}\n"
)


def test_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for text in (
        NF4,
        NF4.replace("ignore", "bits: 4, ignore"),
        NF4.replace("- nf4", "- nf4: {double_quant: true}"),
    ):
        path.write_text(text)
        stage = load_recipe(path).stages[0]
        assert (stage.name, getattr(stage, "double_quant", None)) == ("nf4", "double_quant" in text)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("- nf4", "- awq\n- nf4"), [(5, "awq with nf4; expected awq with rtn or gptq")]),
        (
            ("- nf4", "- nf4\n- gptq"),
            [(6, "both gptq and nf4 round the weights; expected exactly one")],
        ),
        (("- nf4", "- rtn\n- nf4"), [(6, "both rtn and nf4 round the weights")]),
        (("- nf4", "- gptq\n- rtn\n- nf4"), [(7, "all of gptq and rtn and nf4 round the weights")]),
        (
            ("{ignore", "\n  bits: 8\n #{"),
            [(4, "`weights.bits` with nf4; expected nothing: NF4 has 4 bits")],
        ),
        (
            ("{ignore", "\n  group_size: 128\n  symmetric: true\n #{"),
            [(4, "`weights.group_size` with nf4"), (5, "`weights.symmetric`")],
        ),
        (
            (
                "{ignore",
                (
                    "\n  overrides:\n  - {match: a, bits: 8}\n  - match: b\n    group_size: 32\n  -"
                    " {match: c, ignore: true}\n #{"
                ),
            ),
            [
                (5, "`weights.overrides[0].bits` with nf4"),
                (7, "`weights.overrides[1].group_size` with nf4"),
            ],
        ),
        (
            ("- nf4", "- nf4: {double_quant: 1}"),
            [(5, "`stages.nf4.double_quant` is 1 (an integer); expected true or false")],
        ),
        (
            ("- nf4", "- nf4: {doublequant: true}"),
            [(5, "unknown key `doublequant` under `stages.nf4`")],
        ),
        (("- nf4", "- nf4: {blocksize: 128}"), [(5, "unknown key `blocksize` under `stages.nf4`")]),
        (("- nf4", "- nf5"), [(5, "there is no stage `nf5`")]),
    ],
    ids=lambda value: value[1].strip().replace("\n", "|") if isinstance(value, tuple) else "",
)
def test_what_does_not_go_with_nf4(
    tmp_path: Path, change: tuple[str, str], expected: list[tuple[int, str]]
) -> None:
    found = wrong(tmp_path, NF4.replace(*change))
    assert [line.partition(":")[0] for line in found] == [str(line) for line, _ in expected], found
    assert all(part in line for line, (_, part) in zip(found, expected, strict=True)), found


def test_settings_from_the_command_line(tmp_path: Path) -> None:
    assert wrong(tmp_path, NF4, "weights.bits=8") == [
        "--set weights.bits=8: `weights.bits` with nf4; expected nothing: NF4 has 4 bits, blocks of"
        " 64 and a table of its own"
    ]


@pytest.mark.parametrize("name", ["compressed-tensors", "awq", "gptq", "gptq_v2", "gguf"])
def test_formats_of_other_grids_refuse_it_unless_asked(tmp_path: Path, name: str) -> None:
    bench = make_bench(tmp_path, intermediate_size=128)
    text = run(bench, "nf4", {"pack": {"format": name}}, code=2)
    assert "NF4 g64" in text and "a grid of NF4's table" in text
    run(bench, DOUBLE, {"pack": {"format": name, "requantize": True}})
    source, found = load_file(bench.model / "model.safetensors"), Weights(bench.output)
    for module in found.modules:
        weight = source[f"{module}.weight"].float()
        rounded = quantize_nf4(weight, Scheme(4, 64, True, "nf4", True)).dequantize()
        error = (found.tensor(f"{module}.weight") - rounded).norm() / rounded.norm()
        assert error < 0.12, (module, error)


def test_ranks_are_refused(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, intermediate_size=128)
    assert "bitsandbytes has no ranks" in run(bench, "nf4", PACK, {"shard": {"tp": 2}}, code=2)
