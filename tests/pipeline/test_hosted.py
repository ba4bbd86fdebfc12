"""A family without a table from a recipe into transformers: Gemma 3, through hosted blocks.

What transformers computes over the files is the oracle: it shares a layer's class with the
pipeline, and none of what is around it (statistics, folding, rounding, streams, formats).
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

import quantflow
from quantflow.calibration.data import cut_windows, documents
from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.checkpoints.tensor_file import TensorFile, save_tensors
from quantflow.cli.plan import summarise
from quantflow.decoder.decoder import open_decoder
from quantflow.errors import ModelError
from quantflow.formats.reader import Weights
from quantflow.models.config import ConfigProblem
from quantflow.models.library import Library
from quantflow.quant.grid import GridRules
from quantflow.quant.scheme import Scheme
from quantflow.stages.awq_layer import search_layer
from quantflow.tokenizers.load import load_tokenizer
from tests.helpers.hosted import write_gemma3, write_other
from tests.helpers.library import write_tiny
from tests.helpers.runs import invoke
from tests.helpers.tiny import write_llama, write_text
from tests.helpers.zoo import decoder_logits, random_tokens

SAMPLES, SEQLEN = 12, 20  # more than the sliding window's 8
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STAGES: dict[str, list[Any]] = {
    "gptq": ["calibrate", {"awq": {"grid": 4}}, "gptq", "kv_qparams"],
    "rtn": ["calibrate", {"awq": {"grid": 4}}, "rtn", "kv_qparams"],
    "plain": ["rtn"],
}


@dataclass(frozen=True)
class Run:
    """A finished run over a checkpoint in float32."""

    root: Path
    name: str

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def output(self) -> Path:
        return self.root / self.name

    @property
    def report(self) -> Any:
        return json.loads((self.output / "report.json").read_text())

    def packed(self, form: str) -> Path:
        return self.output / form

    def windows(self) -> list[list[int]]:
        tokenizer = load_tokenizer(self.model)
        texts = documents(str(self.root / "calib.txt"))
        return cut_windows(tokenizer, texts, count=SAMPLES, length=SEQLEN).tokens


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gemma3")
    write_gemma3(root / "model")
    write_text(root / "calib.txt", 0, 128)
    write_text(root / "eval.txt", 128, 256)
    return root


@pytest.fixture(scope="module", params=sorted(STAGES))
def finished(request: pytest.FixtureRequest, place: Path) -> Run:
    name = request.param
    recipe = {
        "name": name,
        "model": str(place / "model"),
        "output": str(place / name),
        "calibration": {"data": str(place / "calib.txt"), "samples": SAMPLES, "seqlen": SEQLEN},
        "weights": {"bits": 4, "group_size": 32, "symmetric": True},
        "stages": [
            *STAGES[name],
            {"pack": {"format": "compressed-tensors"}},
            {"pack": {"format": "huggingface"}},
            {"evaluate": {"data": str(place / "eval.txt"), "windows": 4, "length": 24}},
        ],
    }
    (place / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    result = invoke("run", place / f"{name}.yaml", "--device", "cpu")
    assert result.exit_code == 0, result.output
    return Run(place, name)


def transformers_logits(folder: Path, tokens: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(tokens).logits


@pytest.mark.parametrize("form", ["compressed-tensors", "huggingface"])
def test_the_artifact_in_transformers_is_our_reference(finished: Run, form: str) -> None:
    folder, tokens = finished.packed(form), random_tokens(2, 24)
    expected = decoder_logits(Weights(folder), tokens)
    found = transformers_logits(folder, tokens)
    original = transformers_logits(finished.model, tokens)
    assert (expected - original).abs().max() > 0.05  # it is quantised
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


def header(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def test_every_linear_of_the_header_is_quantised_and_nothing_is_dropped(finished: Run) -> None:
    source, packed = header(finished.model), header(finished.packed("compressed-tensors"))
    modules = {n.removesuffix(".weight") for n in source}
    wanted = {module for module in modules if module.rpartition(".")[2] in LINEARS}
    assert len(wanted) == 3 * 7
    assert set(finished.report["linears"]) == wanted
    assert {n.removesuffix(".weight_packed") for n in packed if "weight_packed" in n} == wanted
    kept = {n for n in source if n.removesuffix(".weight") not in wanted}
    assert kept == {n for n in packed if n.endswith(".weight")}
    account = finished.report["tensors"]
    assert account["source"] == len(source) == account["quantised"] + account["kept"]
    assert account["quantised"] == len(wanted) and account["left_out"] == {}


def test_the_divergence_is_that_of_transformers(finished: Run) -> None:
    """KL of the report against the logits of both models in transformers, on the same windows."""
    tokenizer = load_tokenizer(finished.model)
    texts = documents(str(finished.root / "eval.txt"))
    tokens = torch.tensor(cut_windows(tokenizer, texts, count=4, length=24).tokens)
    reference, quantised = (
        transformers_logits(folder, tokens).double().log_softmax(-1)
        for folder in (finished.model, finished.packed("huggingface"))
    )
    kl = (reference.exp() * (reference - quantised)).sum(-1).mean()
    figures = finished.report["quality"]
    assert kl > 1e-3
    assert figures["weights"]["kl_mean"] == pytest.approx(float(kl), rel=1e-3)


def test_kv_parameters_are_of_the_quantised_models_cache(finished: Run) -> None:
    """Extremes of K and V as the quantised model's own cache holds them, over all windows."""
    if finished.name == "plain":
        assert not (finished.output / "kv_qparams.safetensors").exists()
        return
    model = AutoModelForCausalLM.from_pretrained(
        finished.packed("huggingface"), dtype=torch.float32
    )
    cache = DynamicCache()  # without a config it keeps all of a sliding window's keys
    with torch.inference_mode():
        model.eval()(torch.tensor(finished.windows()), past_key_values=cache)
    file = TensorFile(finished.output / "kv_qparams.safetensors")
    for index, layer in enumerate(cache.layers):
        for letter, values in (("k", layer.keys), ("v", layer.values)):
            low, high = float(values.min()), float(values.max())
            name = f"model.layers.{index}.self_attn.{letter}"
            scale, zero = (float(file.read(f"{name}_{part}")) for part in ("scale", "zero_point"))
            assert scale == pytest.approx((high - low) / 255, rel=1e-3)
            assert zero == pytest.approx((high + low) / 2, rel=1e-3, abs=1e-3)


def test_awq_finds_scales_that_change_no_function(place: Path) -> None:
    """Folded into norms that add 1, and into linears, the layer computes what it did; and rounded,
    less is lost."""
    weights = Weights(place / "model")
    decoder, tokens = open_decoder(weights.checkpoint, 24, "cpu"), random_tokens(6, 24)
    outer = weights.outer()
    x = decoder.embed({n: outer[n] for n in decoder.embeds}, tokens, torch.float32)
    tensors = dict(weights.layer(0))
    scheme = Scheme(3, 32, True)
    names = [n for segment in weights.checkpoint.segments(0) for n in segment.names]
    rules = GridRules((torch.float32,))
    result = search_layer(
        decoder.block(0, tensors, torch.float32),
        tensors,
        x,
        dict.fromkeys(names, scheme),
        rules,
        grid=10,
        clip=False,
    )
    assert [line["group"] for line in result.report] == [
        "input_layernorm",
        "self_attn.o_proj",
        "pre_feedforward_layernorm",
        "mlp.down_proj",
    ]
    assert all(line["loss_ratio"] < 1 for line in result.report)
    folded = {**tensors, **result.folding.changed}
    folded |= {f"{n}.weight": result.folding.weight(n, tensors[f"{n}.weight"]) for n in names}

    def output(own: dict[str, Tensor]) -> Tensor:
        return decoder.block(0, own, torch.float32).forward(x) - x

    def rounded(own: dict[str, Tensor]) -> dict[str, Tensor]:
        quantise = scheme.numbers.quantize
        return {
            n: quantise(t, scheme, rules).dequantize() if n.removesuffix(".weight") in names else t
            for n, t in own.items()
        }

    expected = output(tensors)
    assert float((output(folded) - expected).norm() / expected.norm()) < 1e-5
    assert (output(rounded(folded)) - expected).norm() < (
        output(rounded(tensors)) - expected
    ).norm()


def test_the_plan_and_the_report_say_how_it_goes(finished: Run) -> None:
    said = "its layers are computed by Gemma3ForCausalLM of transformers"
    plan = json.loads(
        invoke("plan", finished.root / f"{finished.name}.yaml", "--json", "--device", "cpu").stdout
    )
    assert any(said in note for note in plan["notes"])
    assert any(said in note for note in finished.report["notes"])


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "MODEL", "hello"],
        ["serve", "MODEL"],
        ["verify", "MODEL"],
        ["plan", "--fit", "8GiB", "--model", "MODEL"],
    ],
    ids=lambda command: command[0],
)
def test_the_engine_says_what_runs_it(place: Path, command: list[str]) -> None:
    model = str(place / "model")
    result = invoke(*(model if word == "MODEL" else word for word in command))
    assert result.exit_code == 2
    assert "Gemma3ForCausalLM, which QuantFlow's own engine does not run" in result.stderr
    assert "attn_logit_softcapping is 50.0, expected null" in result.stderr
    assert f"transformers runs it, and vLLM: `vllm serve {model}`" in result.stderr


def changed(root: Path, tensors: dict[str, Tensor | None], **config: Any) -> Path:
    """A Gemma 3 checkpoint with other tensors (None: without) and other config values."""
    folder = write_gemma3(root)
    file = TensorFile(folder / "model.safetensors")
    own = {n: file.read(n) for n in file.tensors} | tensors
    save_tensors(folder / "model.safetensors", {n: t for n, t in own.items() if t is not None})
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


NORM = "model.layers.1.self_attn.k_norm.weight"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({NORM: None}, f"missing tensors: {NORM}"),
        ({NORM: torch.ones(15)}, "shape [15]; expected [16]"),
        ({"model.layers.1.self_attn.sinks": torch.ones(4)}, "does not have: model.layers.1"),
    ],
    ids=["missing", "misshapen", "unknown"],
)
def test_tensors_that_the_class_does_not_expect(
    tmp_path: Path, tensors: dict[str, Any], said: str
) -> None:
    (problem,) = Checkpoint(changed(tmp_path, tensors)).problems()
    assert said in str(problem)


def test_layers_beyond_are_named(tmp_path: Path) -> None:
    extra = {"model.layers.3.mlp.up_proj.weight": torch.ones(96, 64)}
    checkpoint = Checkpoint(changed(tmp_path, extra))
    assert checkpoint.problems() == []
    assert checkpoint.copied == {next(iter(extra)): "in a layer beyond num_hidden_layers = 3"}


def test_a_head_of_its_own_is_kept(tmp_path: Path) -> None:
    """Where config.json says tied and the file has another head, as transformers does."""
    folder = changed(tmp_path, {"lm_head.weight": torch.randn(320, 64) * 0.1})
    weights, tokens = Weights(folder), random_tokens(2, 12)
    assert not weights.checkpoint.config.tied
    found = decoder_logits(weights, tokens)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(found, transformers_logits(folder, tokens), rtol=0, atol=5e-5)


def test_a_type_that_nobody_knows_gets_the_nearest_name(tmp_path: Path) -> None:
    folder = changed(tmp_path, {}, model_type="gemma3_txt")
    with pytest.raises(ModelError, match=r"'gemma3_txt'.*Did you mean 'gemma3_text'"):
        Checkpoint(folder)


def test_an_encoder_is_refused_by_name(tmp_path: Path) -> None:
    """transformers maps it to a causal language model, too."""
    folder = changed(tmp_path, {}, model_type="roberta")
    with pytest.raises(ModelError, match=r"'roberta', an encoder.*expected a decoder of text"):
        Checkpoint(folder)


def test_what_only_a_later_layer_is_refused_for_is_told_at_once(tmp_path: Path) -> None:
    """A library's trace of any layer, not of the first one alone, stands before the plan."""
    folder = write_tiny(tmp_path, "cohere2")
    with pytest.MonkeyPatch.context() as patch:
        trace = Library.trace

        def refused(library: Library, layer: int) -> Any:
            if layer == 1:
                raise ConfigProblem("the second layer is another")
            return trace(library, layer)

        patch.setattr(Library, "trace", refused)
        with pytest.raises(ModelError, match="the second layer is another"):
            Checkpoint(folder)


def test_a_family_with_a_table_needs_no_modelling_code(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    code = (
        "import sys; from pathlib import Path;"
        "from quantflow.checkpoints.checkpoint import Checkpoint;"
        "from quantflow.decoder.decoder import open_decoder;"
        f"open_decoder(Checkpoint(Path({str(model)!r})), 8, 'cpu');"
        "print([n for n in sys.modules if n.startswith('transformers.models')"
        " or n in ('quantflow.models.library', 'quantflow.decoder.hosted')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_matrices_that_are_no_linears_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In plan and report: parameters, transformers' own Conv1D, and a linear that nobody calls."""
    kind = transformers.models.gemma3.modeling_gemma3.Gemma3MLP
    make = kind.__init__

    def more(self: Any, *arguments: Any, **keywords: Any) -> None:
        make(self, *arguments, **keywords)
        self.low_rank = nn.Parameter(torch.zeros(4, 64))
        self.side = transformers.pytorch_utils.Conv1D(8, 64)
        self.spare = nn.Linear(64, 8)

    monkeypatch.setattr(kind, "__init__", more)
    model = write_gemma3(tmp_path / "model", tie_word_embeddings=False)
    recipe = {
        "name": "odd",
        "model": str(model),
        "output": str(tmp_path / "out"),
        "weights": {"bits": 4, "group_size": 32},
        "stages": ["rtn", {"pack": {"format": "huggingface"}}],
    }
    result = quantflow.quantize(recipe, device="cpu")
    kept = json.loads((result.path / "report.json").read_text())["kept"]
    reasons = {
        "low_rank": "a weight of Gemma3MLP, which is no linear",
        "side": "a weight of Conv1D, which is no linear",
        "spare": "a linear that its layer does not call",
    }
    assert kept.pop("lm_head")
    assert kept == {
        f"model.layers.{i}.mlp.{name}": why for i in range(3) for name, why in reasons.items()
    }
    others = summarise(quantflow.plan(recipe, device="cpu"), None)["others"]
    assert others == dict.fromkeys(reasons.values(), 3)


def test_linears_that_the_library_does_not_cut_have_no_ranks(tmp_path: Path) -> None:
    """Phi-3's fused q, k and v: a half of its rows would be no rank's."""
    model = write_other(tmp_path / "model", "phi3")
    recipe = {
        "name": "ranks",
        "model": str(model),
        "output": str(tmp_path / "out"),
        "weights": {"bits": 4, "group_size": 32},
        "stages": ["rtn", {"pack": {"format": "compressed-tensors"}}, {"shard": {"tp": 2}}],
    }
    (tmp_path / "ranks.yaml").write_text(yaml.safe_dump(recipe))
    result = invoke("plan", tmp_path / "ranks.yaml")
    assert result.exit_code == 2
    assert "tp 2: 8 linears that Phi-3 does not cut" in result.stderr


def test_evaluate_cannot_measure_an_engine_that_does_not_run_it(place: Path) -> None:
    recipe = {
        "name": "engine",
        "model": str(place / "model"),
        "output": str(place / "engine"),
        "weights": {"bits": 4, "group_size": 32, "symmetric": True},
        "stages": [
            "rtn",
            {"pack": {"format": "compressed-tensors"}},
            {"evaluate": {"data": str(place / "eval.txt"), "length": 24, "engine": True}},
        ],
    }
    (place / "engine.yaml").write_text(yaml.safe_dump(recipe))
    result = invoke("plan", place / "engine.yaml")
    assert result.exit_code == 2
    assert "evaluate.engine: Gemma3ForCausalLM, which QuantFlow's own engine" in result.stderr


def test_sensitivity_measures_what_transformers_gives(place: Path, tmp_path: Path) -> None:
    """Of one part: transformers' KL with that part's linears rounded, on the same windows."""
    data, out = str(place / "eval.txt"), tmp_path / "sensitivity.json"
    options = ("--samples", 2, "--length", 24, "--group-size", 32, "--bits", "3,8")
    result = invoke("sensitivity", place / "model", "--data", data, "--output", out, *options)
    assert result.exit_code == 0, result.output
    (found,) = [
        part
        for part in json.loads(out.read_text())["parts"]
        if part["name"] == "model.layers.1.mlp.gate_up"
    ]
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32).eval()
    texts = documents(data)
    windows = cut_windows(load_tokenizer(place / "model"), texts, count=2, length=24)
    tokens = torch.tensor(windows.tokens)
    scheme = Scheme(3, 32, False)
    with torch.inference_mode():
        reference = model(tokens).logits.double().log_softmax(-1)
        for name in ("gate_proj", "up_proj"):
            weight = model.model.layers[1].mlp.get_submodule(name).weight
            rounded = scheme.numbers.quantize(weight, scheme, GridRules((torch.float32,)))
            weight.copy_(rounded.dequantize())
        quantised = model(tokens).logits.double().log_softmax(-1)
    kl = float((reference.exp() * (reference - quantised)).sum(-1).mean())
    assert found["kl_mean"]["3"] == pytest.approx(kl, rel=2e-3)
