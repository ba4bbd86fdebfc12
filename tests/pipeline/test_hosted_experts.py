"""Mixtures without a table, from a recipe into transformers: experts that a class holds in tensors
of three dimensions, each matrix quantised.

transformers computes over the files what the artifact is held against; the number of matrices
comes from the safetensors header alone.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantflow.checkpoints.tensor_file import TensorFile, save_tensors
from quantflow.formats.reader import Weights
from tests.helpers.library import HIDDEN, write_tiny
from tests.helpers.runs import invoke
from tests.helpers.tiny import write_text
from tests.helpers.zoo import decoder_logits, random_tokens

# Of types whose checkpoints hold expert by expert: what of their matrices no recipe quantises.
BY_EXPERT = {
    "deepseek_v3": r"mlp\.gate$",
    "minimax_m2": r"block_sparse_moe\.gate$",
    "qwen2_moe": r"mlp\.(gate|shared_expert_gate)$",
}

# Of types whose checkpoints hold all experts of a layer in one tensor: the two of a layer.
IN_ONE = {
    "gpt_oss": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    "granitemoe": ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    "llama4_text": ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
}
NAMED = "llama4_text"  # for which transformers has names of single ones with compressed-tensors
BOTH = ("compressed-tensors", "huggingface")


def run(root: Path, model_type: str, *stages: Any, packs: tuple[str, ...] = BOTH) -> Path:
    if not (root / "model").exists():
        write_tiny(root / "model", model_type)
        write_text(root / "calib.txt", 0, 128)
    output = root / "-".join(packs)
    recipe = {
        "name": model_type,
        "model": str(root / "model"),
        "output": str(output),
        "calibration": {"data": str(root / "calib.txt"), "samples": 12, "seqlen": 20},
        "weights": {"bits": 4, "group_size": 32, "symmetric": True},
        "stages": [*stages, *({"pack": {"format": form}} for form in packs)],
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = invoke("run", root / "recipe.yaml", "--device", "cpu")
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture(scope="module", params=sorted(BY_EXPERT))
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param) / request.param
    root.mkdir()
    return run(root, request.param, "calibrate", {"awq": {"grid": 4}}, "gptq", "kv_qparams")


def test_experts_that_a_file_holds_in_one_tensor_after_all(tmp_path: Path) -> None:
    """As the class itself has them, which transformers reads, too (Qwen3.5-MoE's are so)."""
    folder, tokens = write_tiny(tmp_path, "olmoe"), random_tokens(2, 24)
    expected, names = decoder_logits(Weights(folder), tokens), set(header(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    held = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_tensors(folder / "model.safetensors", held)
    assert any(name.endswith("experts.gate_up_proj") for name in header(folder))
    weights = Weights(folder)
    assert weights.checkpoint.problems() == [] and set(weights.checkpoint.expected) == names
    assert torch.equal(decoder_logits(weights, tokens), expected)


def test_kernels_that_a_class_puts_under_one_another(tmp_path: Path) -> None:
    """Checkpoints hold those of q, k and v, artifacts too; transformers joins them, and does not
    where weights are quantised, which plan and report say."""
    out = run(tmp_path, "olmo_hybrid", "rtn")
    source, packed = header(tmp_path / "model"), header(out / "huggingface")
    assert any(name.endswith("linear_attn.q_conv1d.weight") for name in source)
    assert source == packed
    tokens = random_tokens(2, 24)
    expected = decoder_logits(Weights(out / "huggingface"), tokens)
    torch.testing.assert_close(logits(out / "huggingface", tokens), expected, rtol=0, atol=1e-4)
    warnings = json.loads((out / "report.json").read_text())["warnings"]
    assert any("does not load model.layers.0.linear_attn.conv1d.weight" in w for w in warnings)
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        logits(out / "compressed-tensors", tokens)


def test_what_route_all_cannot_do_is_said(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model", "llama4_text")
    write_text(tmp_path / "calib.txt", 0, 128)
    text = {"data": str(tmp_path / "calib.txt"), "samples": 1, "seqlen": 16}
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "all",
                "model": str(tmp_path / "model"),
                "weights": {"group_size": 32},
                "calibration": text,
                "stages": [{"gptq": {"route": "all"}}, {"pack": {"format": "huggingface"}}],
            }
        )
    )
    result = invoke("plan", tmp_path / "recipe.yaml", "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    (warning,) = json.loads(result.stdout)["warnings"]
    assert warning.startswith("gptq, route: all changes nothing: experts of Llama4ForCausalLM")


def starving(root: Path) -> Path:
    """A mixture whose last router never chooses the third of four experts of layer 1."""
    write_tiny(root / "model", "deepseek_v3", num_hidden_layers=3)
    write_text(root / "calib.txt", 0, 128)
    file = TensorFile(root / "model" / "model.safetensors")
    tensors = {name: file.read(name) for name in file.tensors}
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"][2] = -1e3
    save_tensors(root / "model" / "model.safetensors", tensors)
    return root


def test_with_route_all_no_expert_starves(tmp_path: Path) -> None:
    """Statistics are of all tokens; what goes to the next layer is still what the router chose."""
    root = starving(tmp_path)
    reports, statistics = {}, {}
    for route in ("routed", "all"):
        stages = ({"calibrate": {"route": route}}, {"gptq": {"route": route, "refine": 0}})
        out = run(root, "deepseek_v3", *stages, packs=("huggingface",))
        reports[route] = json.loads((out / "report.json").read_text())
        file = TensorFile(out / "calibration.safetensors")
        statistics[route] = {name: file.read(name) for name in file.tensors}
    tokens = 12 * 20
    starved = {(1, "calibrate"): 1, (1, "gptq"): 1, (2, "calibrate"): 0, (2, "gptq"): 0}
    lines = {(line["layer"], line["stage"]): line for line in reports["routed"]["experts"]}
    assert {key: line["starved"] for key, line in lines.items()} == starved
    assert all(line["count"] == 4 for line in lines.values())
    assert lines[1, "calibrate"]["min"] == 0 < lines[1, "calibrate"]["median"] < tokens
    third = {
        f"model.layers.1.mlp.experts.2.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")
    }
    assert set(reports["routed"]["fallbacks"]) == third
    for line in reports["all"]["experts"]:
        assert (line["min"], line["median"], line["starved"]) == (tokens, tokens, 0)
    assert reports["all"]["fallbacks"] == {}
    assert not any("experts.2.up" in n for n in statistics["routed"] if ".layers.1." in n)
    assert "model.layers.1.mlp.experts.2.up_proj.input.max" in statistics["all"]
    # the last layer's K, the router's input there: as without
    for name in (
        "key.max",
        "self_attn.o_proj.input.absmean",
        "mlp.shared_experts.up_proj.input.max",
    ):
        both = (statistics[route][f"model.layers.2.{name}"] for route in ("routed", "all"))
        torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)


def header(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def logits(folder: Path, tokens: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        found: Tensor = model(tokens).logits
    return found


@pytest.mark.parametrize("form", BOTH)
def test_the_artifact_in_transformers_is_our_reference(finished: Path, form: str) -> None:
    tokens = random_tokens(2, 24)
    expected = decoder_logits(Weights(finished / form), tokens)
    original = logits(finished.parent / "model", tokens)
    assert (expected - original).abs().max() > 0.05  # it is quantised
    torch.testing.assert_close(logits(finished / form, tokens), expected, rtol=0, atol=1e-4)


def test_every_matrix_of_the_header_is_quantised_or_named(finished: Path) -> None:
    source, packed = header(finished.parent / "model"), header(finished / "compressed-tensors")
    matrices = {
        name.removesuffix(".weight")
        for name, shape in source.items()
        if ".layers." in name and len(shape) == 2 and name.endswith(".weight")
    }
    beside = re.compile(BY_EXPERT[finished.parent.name])
    wanted = {name for name in matrices if not beside.search(name)}
    report = json.loads((finished / "report.json").read_text())
    assert set(report["linears"]) == wanted
    assert {n.removesuffix(".weight_packed") for n in packed if "weight_packed" in n} == wanted
    assert sum(".experts." in name for name in wanted) >= 3 * 4
    for name in matrices - wanted:
        assert report["kept"][name] == "the router"
    kept = {n for n in source if n.removesuffix(".weight") not in wanted}
    assert kept == {n for n in packed if ".weight_" not in n}
    account = report["tensors"]
    assert account["source"] == len(source) == account["quantised"] + account["kept"]
    assert account["quantised"] == len(wanted) and account["left_out"] == {}


@pytest.fixture(scope="module", params=sorted(IN_ONE))
def joined(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param) / request.param
    root.mkdir()
    return run(root, request.param, "calibrate", {"awq": {"grid": 4}}, "gptq", "kv_qparams")


@pytest.mark.parametrize("form", BOTH)
def test_experts_in_one_tensor_are_written_back_into_it(joined: Path, form: str) -> None:
    """As the numbers that their codes stand for, also where codes of the others are kept."""
    tokens = random_tokens(2, 24)
    expected = decoder_logits(Weights(joined / "huggingface"), tokens)
    original = logits(joined.parent / "model", tokens)
    assert (expected - original).abs().max() > 0.05
    torch.testing.assert_close(logits(joined / form, tokens), expected, rtol=0, atol=1e-4)
    source, packed = header(joined.parent / "model"), header(joined / form)
    whole = {n: shape for n, shape in source.items() if n.endswith(IN_ONE[joined.parent.name])}
    assert len(whole) == 2 * 2
    if joined.parent.name == NAMED and form == "compressed-tensors":
        assert not set(whole) & set(packed)
        assert sum(".experts." in n and n.endswith(".weight_packed") for n in packed) == 2 * 4 * 3
        return
    assert whole == {n: shape for n, shape in packed.items() if n in whole}
    if form == "huggingface":
        assert source == packed


def test_experts_in_one_tensor_are_quantised_one_by_one(joined: Path) -> None:
    """Of a row and group there are no more values than 4 bits have codes."""
    source = header(joined.parent / "model")
    report = json.loads((joined / "report.json").read_text())
    experts = {name for name in report["linears"] if ".experts." in name}
    assert len(experts) == 2 * 4 * 3  # layers, experts, gate, up and down
    name = next(n for n in source if n.endswith(IN_ONE[joined.parent.name][1]))
    down = TensorFile(joined / "huggingface" / "model.safetensors").read(name)
    if joined.parent.name != "granitemoe":
        down = down.transpose(1, 2)
    assert down.shape[:2] == (4, HIDDEN)
    assert all(len(group.unique()) <= 16 for row in down.flatten(0, 1) for group in row.split(32))
    warnings = " ".join(report["warnings"])
    lost = "no loader has names for a single expert of this family: 24 linears" in warnings
    assert lost is (joined.parent.name != NAMED)


def test_where_no_format_holds_experts_they_stay(joined: Path) -> None:
    """Nothing is rounded that could not be stored."""
    root = joined.parent
    if root.name == NAMED:
        pytest.skip("compressed-tensors holds them")
    out = run(root, root.name, "rtn", packs=("compressed-tensors",))
    report = json.loads((out / "report.json").read_text())
    assert report["linears"] and not any(".experts." in name for name in report["linears"])
    kept = [why for name, why in report["kept"].items() if ".experts." in name]
    reason = "compressed-tensors: no loader has names for a single expert of this family"
    assert kept == [reason] * 24
    source = TensorFile(root / "model" / "model.safetensors")
    packed = TensorFile(out / "model.safetensors")
    for name in source.tensors:
        if name.endswith(IN_ONE[root.name]):
            assert torch.equal(source.read(name), packed.read(name))
    tokens = random_tokens(2, 24)
    found = decoder_logits(Weights(out), tokens)
    torch.testing.assert_close(logits(out, tokens), found, rtol=0, atol=1e-4)
