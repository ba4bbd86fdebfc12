"""Folding leaves a layer's function as it is, in float64 for every kind of layer."""

from __future__ import annotations

import pytest
import torch

from quantflow.stages.folding import Folding
from tests.helpers.layers import CONFIGS, TinyLayer, folded


def random_scale(k: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Between 1/16 and 16."""
    return (
        (torch.rand(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 8 - 4)
        .exp2()
        .to(dtype)
    )


def fold_everything(tiny: TinyLayer, dtype: torch.dtype = torch.float64) -> Folding:
    """Random scales wherever AWQ may put some."""
    names, config, folding = tiny.architecture.layer, tiny.config, Folding()
    moe = config.is_moe(0)
    folding.fold_norm(
        names.attention_norm,
        tiny.tensors,
        [names.q, names.k, names.v],
        random_scale(config.hidden, 0, dtype),
    )
    values = random_scale(config.kv_heads * config.head_dim, 1, dtype)
    shared = (
        values.view(config.kv_heads, 1, -1)
        .expand(-1, config.heads // config.kv_heads, -1)
        .reshape(-1)
    )
    folding.fold_linear(names.v, names.o, tiny.tensors, values, shared)
    experts = list(range(config.experts)) if moe else [None]
    readers = [n for e in experts for n in names.mlp(e)[:2] if n] + ([names.router] if moe else [])
    folding.fold_norm(names.mlp_norm, tiny.tensors, readers, random_scale(config.hidden, 2, dtype))
    for e in experts:
        _, up, down = names.mlp(e)
        scale = random_scale(config.width(0), 3 + (e or 0), dtype)
        folding.fold_linear(up, down, tiny.tensors, scale, scale)
    return folding


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_the_folded_layer_computes_the_same(model_type: str) -> None:
    tiny = TinyLayer(model_type)
    x = tiny.input()
    expected = tiny.layer().forward(x)
    folding = fold_everything(tiny)
    after = folded(tiny.tensors, folding)
    assert relative(tiny.layer(after).forward(x), expected) < 1e-10
    # And not because nothing changed.
    for linear in tiny.linears():
        assert relative(after[f"{linear}.weight"], tiny.tensors[f"{linear}.weight"]) > 0.1
    for name in folding.changed:
        assert relative(after[name], tiny.tensors[name]) > 0.1


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_every_part_matters(model_type: str) -> None:
    """Leaving out any one of the changes is noticed, so the test above sees all of them."""
    tiny = TinyLayer(model_type)
    x = tiny.input()
    expected, folding = tiny.layer().forward(x), fold_everything(tiny)
    after = folded(tiny.tensors, folding)
    for name in {*folding.changed, *(f"{n}.weight" for n in {*folding.columns, *folding.rows})}:
        left_out = {**after, name: tiny.tensors[name]}
        assert relative(tiny.layer(left_out).forward(x), expected) > 1e-4, name
    assert set(folding.changed) <= set(tiny.tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mixtral"])
def test_16_bit_norms_cost_nothing(model_type: str, dtype: torch.dtype) -> None:
    """Linears are multiplied by the ratio to the norm as it is stored, so its rounding cancels."""
    tiny = TinyLayer(model_type)
    names = tiny.architecture.layer
    norms = [f"{n}.weight" for n in (names.attention_norm, names.mlp_norm)]
    for name in norms:
        tiny.tensors[name] = tiny.tensors[name].to(dtype)
    x = tiny.input()
    expected = tiny.layer().forward(x)
    folding = fold_everything(tiny)
    assert all(folding.changed[name].dtype == dtype for name in norms)
    assert relative(tiny.layer(folded(tiny.tensors, folding)).forward(x), expected) < 1e-10
    # AWQ's own scales are float32.
    assert (
        relative(
            tiny.layer(folded(tiny.tensors, fold_everything(tiny, torch.float32))).forward(x),
            expected,
        )
        < 1e-6
    )
    # The scale itself, in place of that ratio, would be off by the norm's rounding.
    naive = fold_everything(tiny)
    for group, seed in (
        ([names.q, names.k, names.v], 0),
        ([n for n in naive.columns if "mlp" in n or "sparse" in n], 2),
    ):
        for reader in group:
            if naive.columns[reader].shape == (tiny.config.hidden,):
                naive.columns[reader] = random_scale(tiny.config.hidden, seed)
    assert relative(tiny.layer(folded(tiny.tensors, naive)).forward(x), expected) > 1e-4


def test_fold_norm_by_hand() -> None:
    tensors = {
        "n.weight": torch.tensor([1.0, 3.0, 0.0, 1.0], dtype=torch.bfloat16),
        "n.bias": torch.tensor([2.0, -6.0, 1.0, 0.0]),
    }
    folding = Folding()
    folding.fold_norm("n", tensors, ["a", "b"], torch.tensor([2.0, 0.5, 4.0, 3.0]))
    # A third in bfloat16 is 171 / 512; a norm of 0 stays and its channel is left alone.
    assert folding.changed["n.weight"].tolist() == [0.5, 6.0, 0.0, 171 / 512]
    assert folding.columns["a"] is folding.columns["b"]
    torch.testing.assert_close(folding.columns["a"], torch.tensor([2.0, 0.5, 1.0, 512 / 171]))
    torch.testing.assert_close(folding.changed["n.bias"], torch.tensor([1.0, -12.0, 1.0, 0.0]))
    assert tensors["n.weight"].tolist() == [1.0, 3.0, 0.0, 1.0]


@pytest.mark.parametrize(("old", "scale"), [(1e-7, 1e4), (60000.0, 1e-4), (-0.5, 3.0), (6e-8, 0.7)])
def test_a_norm_that_cannot_be_divided_is_left_alone(old: float, scale: float) -> None:
    tensors = {"n.weight": torch.tensor([old], dtype=torch.float16)}
    folding = Folding()
    folding.fold_norm("n", tensors, ["a"], torch.tensor([scale]))
    new, ratio = folding.changed["n.weight"].double(), folding.columns["a"].double()
    assert new.isfinite().all() and new.ne(0).all() and ratio.isfinite().all() and (ratio > 0).all()
    torch.testing.assert_close(new * ratio, tensors["n.weight"].double(), rtol=1e-6, atol=0)


def test_weight_by_hand() -> None:
    stored = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    folding = Folding(
        columns={"a": torch.tensor([10.0, 100.0]), "b": torch.tensor([1.0, 3.0])},
        rows={"a": torch.tensor([2.0, 4.0])},
    )
    weight = folding.weight("a", stored)
    assert weight.dtype == torch.float32 and weight.tolist() == [[5.0, 100.0], [7.5, 100.0]]
    assert folding.weight("b", stored).tolist() == [[1.0, 6.0], [3.0, 12.0]]
    untouched = folding.weight("c", stored.float())
    untouched += 1
    assert stored.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    wide = stored.float()
    assert (
        folding.weight("c", wide) is not wide
        and folding.weight("c", wide).data_ptr() != wide.data_ptr()
    )


def test_fold_linear_by_hand() -> None:
    tensors = {
        "v.weight": torch.ones(2, 2),
        "v.bias": torch.tensor([4.0, 9.0], dtype=torch.float16),
        "o.weight": torch.ones(1, 4),
    }
    folding = Folding()
    folding.fold_linear(
        "v", "o", tensors, torch.tensor([2.0, 3.0]), torch.tensor([2.0, 3.0, 2.0, 3.0])
    )
    assert folding.changed["v.bias"].dtype == torch.float16 and folding.changed[
        "v.bias"
    ].tolist() == [2.0, 3.0]
    assert folding.weight("o", tensors["o.weight"]).tolist() == [[2.0, 3.0, 2.0, 3.0]]
    torch.testing.assert_close(
        folding.weight("v", tensors["v.weight"]), torch.tensor([[0.5, 0.5], [1 / 3, 1 / 3]])
    )


def test_a_norm_that_adds_one_is_divided_as_it_multiplies() -> None:
    """1 + 0.5 halved is 1 - 0.25; in bfloat16, 1 + 0.0625 divided by 1.7 lies off its numbers, and
    the readers get what it was really divided by. What would be 1 + -1 stays."""
    weights = {"norm.weight": torch.tensor([0.5, 0.0625, -1.0], dtype=torch.bfloat16)}
    folding = Folding()
    folding.fold_norm("norm", weights, ["q"], torch.tensor([2.0, 1.7, 3.0]), offset=1.0)
    stored, columns = folding.changed["norm.weight"], folding.columns["q"]
    assert stored.dtype == torch.bfloat16
    assert stored.tolist() == [-0.25, -0.375, -1.0]
    assert columns.tolist() == pytest.approx([2.0, 1.0625 / 0.625, 1.0])
