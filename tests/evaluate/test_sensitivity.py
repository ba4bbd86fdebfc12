"""The divergence of one part's rounding, against transformers with that linear replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.decoder.stream import Room
from quantflow.evaluate import distributions, divergence, sensitivity
from quantflow.evaluate.sensitivity import Measure, Rounding, parts
from quantflow.formats.reader import Weights
from quantflow.quant.grid import GridRules
from quantflow.quant.scheme import Scheme
from tests.helpers import zoo
from tests.helpers.tiny import write_llama

SCHEME = Scheme(3, 16, False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(
        tmp_path_factory.mktemp("sensitivity") / "model", dtype=torch.float32, num_hidden_layers=3
    )


def tokens() -> Tensor:
    return torch.randint(0, 300, (5, 24), generator=torch.Generator().manual_seed(2))


def measure(model: Path, folder: Path | None = None) -> Measure:
    room = Room(torch.device("cpu"), folder)
    return Measure(Weights(model), tokens(), GridRules((torch.float32,)), room)


def rounded(weight: Tensor, scheme: Scheme) -> Tensor:
    """Round to nearest written down again: min, max and zero give a scale and a zero point to each
    group."""
    parts = weight.reshape(weight.shape[0], -1, scheme.group_size)
    low, high = parts.amin(-1, True).clamp(max=0), parts.amax(-1, True).clamp(min=0)
    scale = (high - low) / scheme.levels
    zero = (-low / scale).round()
    return (((parts / scale + zero).round().clamp(0, scheme.levels) - zero) * scale).reshape(
        weight.shape
    )


def transformers_kl(model: Path, replaced: list[str]) -> float:
    """With these linears rounded."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    with torch.inference_mode():
        before = network(tokens()).logits.log_softmax(-1)
        for name in replaced:
            weight = network.get_submodule(name).weight
            weight.copy_(rounded(weight.float(), SCHEME).double())
        after = network(tokens()).logits.log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_each_part_against_transformers(model: Path) -> None:
    found = parts(Weights(model).checkpoint)
    by_layer = dict(
        measure(model).layer_by_layer(lambda i: [p.rounded(SCHEME) for p in found if p.layer == i])
    )
    assert [len(by_layer[i]) for i in range(3)] == [4, 4, 4]
    for part, kl in zip(found, [kl for i in range(3) for kl in by_layer[i]], strict=True):
        if part.layer != 1:  # the first layer, whose input is the embedding, and the last
            modules = [f"model.layers.{part.layer}.{name}" for name in part.shapes]
            assert kl == pytest.approx(transformers_kl(model, modules), rel=2e-3), part.name
    every = [
        name for part in found for name in [f"model.layers.{part.layer}.{n}" for n in part.shapes]
    ]
    together: dict[int, dict[str, Scheme]] = {}
    for part in found:
        together.setdefault(part.layer, {}).update(dict.fromkeys(part.shapes, SCHEME))
    assert measure(model).whole([together, {}]) == [
        pytest.approx(transformers_kl(model, every), rel=2e-3),
        0.0,
    ]


def test_files_or_memory_and_any_start_give_the_same_bits(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wanted(index: int) -> list[Rounding]:
        return [{index: {"mlp.down_proj": SCHEME}}, {index: {"self_attn.q_proj": SCHEME}}]

    whole = dict(measure(model).layer_by_layer(wanted))
    assert dict(measure(model, tmp_path).layer_by_layer(wanted)) == whole and not list(
        tmp_path.iterdir()
    )
    assert dict(measure(model).layer_by_layer(wanted, first=2)) == {2: whole[2]}
    # a few rows at a time, across windows
    monkeypatch.setattr(distributions, "LOGIT_ELEMENTS", 7 * 320)
    monkeypatch.setattr(divergence, "BATCH_TOKENS", 24)
    for index, found in measure(model).layer_by_layer(wanted):
        assert found == pytest.approx(whole[index], rel=1e-3)


def test_only_the_layers_from_a_part_on_are_computed(model: Path) -> None:
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1

    found = Measure(Weights(model), tokens(), GridRules(), Room(torch.device("cpu")), step)
    list(found.layer_by_layer(lambda i: [{i: {"mlp.down_proj": SCHEME}}]))
    assert steps == 3 + (3 + 2 + 1) + 2, (
        "the reference, each layer's roundings, and the way to the next layer"
    )


@pytest.mark.parametrize(
    ("name", "granularity", "expected"),
    [
        (
            "qwen2",
            "fused",
            [
                ("self_attn.qkv", 3),
                ("self_attn.o_proj", 1),
                ("mlp.gate_up", 2),
                ("mlp.down_proj", 1),
            ],
        ),
        ("opt", "fused", [("self_attn.qkv", 3), ("self_attn.out_proj", 1), ("fc1", 1), ("fc2", 1)]),
        ("qwen3_moe", "layer", [("", 16)]),
        (
            "qwen2",
            "module",
            [(f"self_attn.{n}_proj", 1) for n in "qkvo"]
            + [(f"mlp.{n}_proj", 1) for n in ("gate", "up", "down")],
        ),
    ],
)
def test_parts(
    tmp_path: Path, name: str, granularity: sensitivity.Granularity, expected: list[tuple[str, int]]
) -> None:
    checkpoint = Checkpoint(zoo.write(tmp_path, zoo.specimen(name)))
    last = checkpoint.config.layers - 1
    found = [p for p in parts(checkpoint, granularity) if p.layer == last]
    prefix = checkpoint.architecture.layer_prefix(last)
    assert [
        (p.name.removeprefix(prefix).removeprefix("."), len(p.shapes)) for p in found
    ] == expected


def test_the_experts_of_a_layer_are_one_part(tmp_path: Path) -> None:
    checkpoint = Checkpoint(zoo.write(tmp_path, zoo.specimen("mixtral")))
    found = [p for p in parts(checkpoint) if p.layer == 0]
    assert [len(p.shapes) for p in found] == [3, 1, 3 * checkpoint.config.experts]
    assert found[2].name.endswith("experts") and not any("attn" in name for name in found[2].shapes)
