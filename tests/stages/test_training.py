"""`block_ap` and `signround`, in whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantflow.decoder import walk
from quantflow.decoder.stream import Room
from quantflow.evaluate.divergence import Variant
from quantflow.formats.reader import Weights
from quantflow.pipeline.plan import make_plan
from quantflow.pipeline.windows import recipe_windows
from quantflow.stages.registry import load_recipe
from quantflow.tokenizers.load import load_tokenizer
from tests.helpers.runs import Bench, contents, invoke, make_bench
from tests.helpers.zoo import specimen, write

TRAINING: tuple[dict[str, Any], ...] = (
    {"block_ap": {"epochs": 2, "batch": 1, "held_out": 0}},
    {"signround": {"iterations": 20, "batch": 6, "held_out": 0}},
)
NAMES = ["block_ap", "signround"]
PACK = {"pack": {"format": "gptq_v2"}}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return make_bench(tmp_path)


def trained(bench: Bench, *stages: Any, bits: int = 2, **changes: Any) -> Path:
    weights = {"bits": bits, "group_size": 16, "symmetric": False}
    return bench.recipe(**{"weights": weights, "stages": [*stages, PACK], **changes})


def losses_of(bench: Bench, recipe: Path) -> list[list[float]]:
    """Of each layer, before training and at every look at the held-out windows."""
    result = invoke("run", recipe)
    assert result.exit_code == 0, result.output
    report = json.loads((bench.output / "report.json").read_text())
    assert [layer["layer"] for layer in report["training"]] == [0, 1]
    return [layer["losses"] for layer in report["training"]]


@pytest.mark.parametrize("stage", TRAINING, ids=NAMES)
@pytest.mark.parametrize("before", [(), ("rtn",), ({"awq": {"grid": 2}},)])
def test_the_loss_falls_and_what_is_kept_is_its_least(
    bench: Bench, stage: dict[str, Any], before: tuple[Any, ...]
) -> None:
    """Also with nothing before, after another rounding and after folding."""
    per_layer = losses_of(bench, trained(bench, *before, stage))
    assert all(min(losses) < losses[0] for losses in per_layer)


@pytest.mark.parametrize("stage", TRAINING, ids=NAMES)
def test_what_training_does_not_improve_stays_as_it_was(
    bench: Bench, stage: dict[str, Any]
) -> None:
    """GPTQ fits so few tokens nearly exactly, and no rate as large as this one does better."""
    name = next(iter(stage))
    coarse = {"weight_lr": 1.0, "scale_lr": 1.0} if name == "block_ap" else {"iterations": 1}
    per_layer = losses_of(bench, trained(bench, "gptq", {name: stage[name] | coarse}))
    assert all(min(losses) == losses[0] for losses in per_layer)
    kept = load_file(bench.output / "model.safetensors")
    bench.clear()
    assert invoke("run", trained(bench, "gptq")).exit_code == 0
    alone = load_file(bench.output / "model.safetensors")
    assert kept.keys() == alone.keys()
    assert all(torch.equal(kept[key], alone[key]) for key in alone)


@pytest.mark.parametrize("stage", TRAINING, ids=NAMES)
def test_killed_between_layers_it_ends_with_the_same_bytes(
    bench: Bench, stage: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = trained(bench, "gptq", stage)
    assert invoke("run", recipe).exit_code == 0
    whole = contents(bench.output)
    bench.clear()
    save, saved = walk._save, list[int]()

    def dying(shelf: Any, index: int, result: Any, streams: Any) -> None:
        save(shelf, index, result, streams)
        saved.append(index)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(walk, "_save", dying)
        invoke("run", recipe)
    assert saved == [0] and not bench.output.exists()
    before = bench.layers()
    assert invoke("run", recipe).exit_code == 0
    assert contents(bench.output) == whole
    after = bench.layers()
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("name", ["mixtral", "opt"])
@pytest.mark.parametrize("stage", TRAINING, ids=NAMES)
def test_other_families(bench: Bench, name: str, stage: dict[str, Any]) -> None:
    folder = write(bench.root / name, specimen(name))
    recipe = trained(bench, stage, bits=4, model=str(folder))
    assert all(min(losses) < losses[0] for losses in losses_of(bench, recipe))


def test_kv_ranges_are_the_trained_models(bench: Bench) -> None:
    """What another stage's K and V were before is of no weights that anybody has."""
    recipe = trained(bench, "calibrate", "rtn", TRAINING[0], "kv_qparams")
    assert invoke("run", recipe).exit_code == 0
    plan = make_plan(load_recipe(recipe))
    tokenizer = load_tokenizer(plan.checkpoint.tokenizer_path)
    tokens = torch.tensor(recipe_windows(plan, tokenizer, "calibration").tokens)
    seen: dict[int, list[Tensor]] = {0: [], 1: []}

    def watching(index: int) -> Any:
        def observe(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            seen[index].append(v.amax((0, 2, 3)))
            return k, v

        return observe

    with torch.inference_mode():
        Variant(Weights(bench.output), watching).states(tokens, Room(torch.device("cpu"))).close()
    report = json.loads((bench.output / "report.json").read_text())
    assert any(min(layer["losses"]) < layer["losses"][0] for layer in report["training"])
    for index, parts in seen.items():
        heads = torch.stack(parts).amax(0).tolist()
        assert report["kv"]["value"]["high"][index] == pytest.approx(
            heads, rel=3e-3
        )  # three digits


def test_what_cannot_stand_together(bench: Bench) -> None:
    dynamic = trained(bench, {"gptq": {"act_order": "dynamic"}}, TRAINING[0])
    result = invoke("plan", dynamic)
    assert result.exit_code == 2 and "act_order: dynamic before block_ap" in result.output
    both = trained(bench, *TRAINING)
    assert "both block_ap and signround round the weights" in invoke("plan", both).output
    nf4 = trained(bench, "nf4", TRAINING[0])
    assert invoke("plan", nf4).exit_code == 2
    backwards = trained(bench, TRAINING[0], "gptq")
    assert invoke("plan", backwards).exit_code == 2


def test_a_hosted_family_is_trained(bench: Bench) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, sliding_window=16,
    )  # fmt: skip
    folder = bench.root / "gemma"
    Gemma3ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (bench.model / name).exists():
            (folder / name).write_bytes((bench.model / name).read_bytes())
    recipe = trained(bench, TRAINING[0], model=str(folder))
    assert all(min(losses) < losses[0] for losses in losses_of(bench, recipe))
