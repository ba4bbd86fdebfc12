"""GGUF files of whole runs: read back exactly, and run by llama.cpp where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantflow.errors import FormatError
from quantflow.formats.reader import Weights
from quantflow.pipeline.export import Options, export
from quantflow.quant.numbers.minimum import MinimumTensor
from quantflow.quant.scheme import Scheme
from quantflow.tokenizers.load import load_tokenizer
from tests.helpers.runs import UNLIKE, Bench, contents, invoke, make_bench
from tests.helpers.zoo import decoder_logits, specimen, write

DATA = Path(__file__).parents[2] / "calib_data"


def run(root: Path, weights: dict[str, Any], pack: str = "compressed-tensors") -> Bench:
    bench = make_bench(root, intermediate_size=128)
    result = invoke(
        "run", bench.recipe(weights=weights, stages=["rtn", {"pack": {"format": pack}}])
    )
    assert result.exit_code == 0, result.output
    return bench


def tensors(folder: Path) -> dict[str, Any]:
    """Codes, scales and zero points of what is quantised, and everything else in float32."""
    weights, found = Weights(folder), {}
    for name in weights.checkpoint.expected:
        if weights.is_quantised(name):
            tensor = weights.quantized(name.removesuffix(".weight"))
            grid = (
                tensor.minimums
                if isinstance(tensor, MinimumTensor)
                else getattr(tensor, "zeros", None)
            )
            found[name] = (tensor.scheme, tensor.codes, tensor.scales.double(), grid)
        else:
            found[name] = weights.tensor(name).float()
    return found


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert set(a) == set(b)
    for name, value in a.items():
        if isinstance(value, tuple):
            assert value[0] == b[name][0] and all(
                torch.equal(x, y) for x, y in zip(value[1:], b[name][1:], strict=True)
            ), name
        else:
            assert torch.equal(value, b[name]), name


SYMMETRIC = {"bits": 4, "group_size": 32, "symmetric": True}
MIXED = SYMMETRIC | {
    "overrides": [{"match": "*.down_proj", "bits": 8}, {"match": "*.o_proj", "group_size": 64}]
}


@pytest.mark.parametrize(
    "weights", [SYMMETRIC, SYMMETRIC | {"group_size": -1}, MIXED], ids=["group", "channel", "mixed"]
)
@pytest.mark.parametrize("pack", ["compressed-tensors", "gptq_v2"])
def test_symmetric_weights_go_there_and_back(
    tmp_path: Path, weights: dict[str, Any], pack: str
) -> None:
    bench = run(tmp_path, weights, pack)
    done = export(bench.output, "gguf", tmp_path / "gguf")
    assert (done.source_format, done.format, done.modules, done.errors) == (pack, "gguf", 14, {})
    assert {"model.gguf", "tokenizer.json"} <= set(contents(tmp_path / "gguf")) and not (
        tmp_path / "gguf" / "config.json"
    ).exists()
    assert_same(tensors(tmp_path / "gguf"), tensors(bench.output))
    # the file, or its directory
    done = export(tmp_path / "gguf" / "model.gguf", pack, tmp_path / "back")
    assert done.source_format == "gguf" and done.errors == {}
    assert_same(tensors(tmp_path / "back"), tensors(bench.output))
    export(tmp_path / "back", "gguf", tmp_path / "again")
    assert contents(tmp_path / "again", UNLIKE) == contents(tmp_path / "gguf", UNLIKE)


def test_a_run_packs_what_an_export_writes(tmp_path: Path) -> None:
    """Scales are rounded to fp16 before the weights are quantised, and every gguf file of them is
    the same."""
    bench = run(tmp_path, SYMMETRIC, "gguf")
    export(bench.output, "gguf", tmp_path / "again")
    assert (tmp_path / "again" / "model.gguf").read_bytes() == (
        bench.output / "model.gguf"
    ).read_bytes()
    export(bench.output, "gptq_v2", tmp_path / "gptq")
    assert_same(tensors(tmp_path / "gptq"), tensors(bench.output))


def test_asymmetric_weights_are_exact_or_asked_for(tmp_path: Path) -> None:
    bench = run(tmp_path, SYMMETRIC | {"symmetric": False})
    with pytest.raises(FormatError, match=r"minimums .* no exact float16"):
        export(bench.output, "gguf", tmp_path / "no")
    assert not (tmp_path / "no").exists() and not list(tmp_path.glob(".no*"))
    done = export(bench.output, "gguf", tmp_path / "gguf", Options(requantize=True))
    # minimums rounded to fp16, not weights to 4 bits
    assert len(done.errors) > 7 and max(done.errors.values()) < 0.01
    schemes = {
        value[0] for value in tensors(tmp_path / "gguf").values() if isinstance(value, tuple)
    }
    assert schemes == {Scheme(4, 32, False, "minimum")}
    with pytest.raises(FormatError, match="with floating minimums"):
        export(tmp_path / "gguf", "compressed-tensors", tmp_path / "no")


def test_what_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    bench = run(tmp_path, {"bits": 4, "group_size": 16, "symmetric": True})
    for options, said in (
        (Options(), "group_size 16; expected a multiple of 32"),
        (Options(tp=2), "has no ranks"),
    ):
        with pytest.raises(FormatError, match=said) as refused:
            export(bench.output, "gguf", tmp_path / "no", options)
        assert "q_proj and 13 more" in str(refused.value)
    for name, expected in (
        ("mistral", "sliding window"),
        ("phi3", "sliding window"),
        ("gemma2", "query_pre_attn_scalar 20; expected 24"),
        ("gemma3", r"every 6th layer(.|\n)*rope_theta 100"),
    ):
        with pytest.raises(FormatError, match=expected):
            export(write(tmp_path / name, specimen(name)), "gguf", tmp_path / "no")
    assert not (tmp_path / "no").exists()


# --- llama.cpp


def llama_cpp_logits(file: Path, windows: list[list[int]]) -> torch.Tensor:
    """`[B, L, V]`: what llama.cpp computes for each window of tokens."""
    llama_cpp = pytest.importorskip("llama_cpp")
    length = max(map(len, windows))
    model = llama_cpp.Llama(
        str(file),
        n_ctx=length,
        n_batch=length,
        logits_all=True,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
    )
    found = []
    for window in windows:
        model.reset()
        model.eval(window)
        found.append(torch.from_numpy(np.array(model.scores[: len(window)])))
    return torch.stack(found)


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.argmax(-1) == b.argmax(-1)).double().mean())


def test_llama_cpp_runs_the_demo_model(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    recipe = {
        "name": "demo",
        "model": str(DATA / "demo_model"),
        "output": str(tmp_path / "artifact"),
        "weights": SYMMETRIC,
        "stages": ["rtn", {"pack": {"format": "gguf"}}],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    result = invoke("run", tmp_path / "recipe.yaml")
    assert result.exit_code == 0, result.output
    file = tmp_path / "artifact" / "model.gguf"

    text = (DATA / "demo_eval.txt").read_text(encoding="utf-8")[:4000]
    ids = load_tokenizer(tmp_path / "artifact").encode(text).ids
    theirs = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    assert theirs.tokenize(text.encode(), special=True) == ids
    assert theirs.detokenize(ids[1:]).decode() == text

    windows = [ids[start : start + 128] for start in range(0, 640, 128)]
    ours = decoder_logits(Weights(file), torch.tensor(windows))
    assert (
        ours.shape[:2].numel() == 640 and agreement(llama_cpp_logits(file, windows), ours) >= 0.95
    )

    export(file, "huggingface", tmp_path / "plain", Options(dtype="float32"))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    with torch.inference_mode():
        assert agreement(model(torch.tensor(windows)).logits, ours) > 0.999


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


GEMMA3 = {  # full attention in the sixth of seven layers
    "num_hidden_layers": 7,
    "query_pre_attn_scalar": 24,
    "sliding_window_pattern": 6,
    "rope_local_base_freq": 10000.0,
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama3", {}),
        ("llama_bias", {}),
        ("llama_bias", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("llama_bias", {"rope_scaling": YARN}),
        ("llama_bias", {"rope_scaling": LLAMA3}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": False}),
        ("qwen3", {}),
        ("phi3", {"sliding_window": None}),
        ("phi4_mini", {}),
        ("glm4", {}),
        ("gemma2", {"query_pre_attn_scalar": 24}),
        ("gemma3", GEMMA3),
    ],
    ids=[
        "llama3", "bias", "linear", "yarn", "llama3 scaling", "mistral", "qwen2", "qwen3", "phi3",
        "phi4-mini", "glm4", "gemma2", "gemma3",
    ],
)  # fmt: skip
def test_llama_cpp_computes_every_family(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    """Plain weights in float32: what differs is the order of additions, and not the decoder."""
    found = specimen(name)
    tensors = dict(found.tensors)
    for i in range(2, changes.get("num_hidden_layers", 2)):  # the first again
        first = {n: t for n, t in found.tensors.items() if n.startswith("model.layers.0.")}
        tensors |= {n.replace(".0.", f".{i}.", 1): t.clone() for n, t in first.items()}
    write(tmp_path / "source", type(found)(found.config | changes, tensors))
    export(tmp_path / "source", "gguf", tmp_path / "gguf")
    tokens = torch.randint(2, 300, (2, 96), generator=torch.Generator().manual_seed(1))
    theirs = llama_cpp_logits(tmp_path / "gguf" / "model.gguf", tokens.tolist())
    ours = decoder_logits(Weights(tmp_path / "gguf"), tokens)
    assert agreement(theirs, ours) >= 0.98
    # llama.cpp keeps keys and values in fp16
    assert float((theirs - ours).norm() / ours.norm()) < 0.02


def test_the_engine_runs_a_file(tmp_path: Path) -> None:
    from quantflow import LLM, SamplingParams

    bench = run(tmp_path, SYMMETRIC)
    export(bench.output, "gguf", tmp_path / "gguf")
    params = SamplingParams(max_tokens=8, logprobs=0)
    expected = LLM(bench.output, device="cpu").generate("The cat", params)[0].completions
    assert (
        LLM(tmp_path / "gguf", device="cpu").generate("The cat", params)[0].completions == expected
    )


def test_a_recipe_rounds_to_floating_minimums(tmp_path: Path) -> None:
    """Each block of 32 spans its least and its largest weight in 15 steps, as Q4_1's do."""
    bench = run(tmp_path, {"numbers": "minimum", "group_size": 32}, "gguf")
    written, source = Weights(bench.output), Weights(bench.model)
    for module in sorted(written.modules):
        tensor, weight = written.quantized(module), source.tensor(f"{module}.weight").float()
        assert isinstance(tensor, MinimumTensor)
        blocks = weight.view(len(weight), -1, 32)
        low, high = blocks.amin(-1), blocks.amax(-1)
        step = (high - low) / 15
        # numbers of float16 that bfloat16 holds too: 8 bits, or what is left of them below 2^-14
        torch.testing.assert_close(tensor.minimums.float(), low, rtol=2**-8, atol=2**-24)
        torch.testing.assert_close(tensor.scales.float(), step, rtol=2**-8, atol=2**-24)
        # half a step, and what rounding took from the minimum and 15 times from the step
        off = (tensor.dequantize() - weight).view(blocks.shape).abs().amax(-1)
        assert bool((off <= 0.5 * step + 2**-8 * (low.abs() + 15 * step) + 2**-20).all())
