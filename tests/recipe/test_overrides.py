"""Widths as few patterns: short where layers are alike, and always just the widths that were asked
for."""

from __future__ import annotations

import random

from quantflow.recipe.overrides import compact, matches

LEAVES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def test_layers_that_are_alike_share_a_pattern() -> None:
    widths = {f"model.layers.{i}.{leaf}": 4 for i in range(32) for leaf in LEAVES}
    for i in range(32):
        widths[f"model.layers.{i}.mlp.down_proj"] = 8
    for i in (0, 3, 5, 13, 17, 31):
        for letter in "qkv":
            widths[f"model.layers.{i}.self_attn.{letter}_proj"] = 3
    found = compact(widths)
    assert found.bits == 4
    assert set(found.overrides) == {
        ("model.layers.*.mlp.down_proj", 8), ("model.layers.[035].self_attn.[kqv]_proj", 3),
        ("model.layers.1[37].self_attn.[kqv]_proj", 3), ("model.layers.31.self_attn.[kqv]_proj", 3),
    }  # fmt: skip
    assert compact(dict.fromkeys(widths, 3)).overrides == ()


def test_every_module_gets_just_its_width() -> None:
    chance = random.Random(1)
    experts = tuple(f"block_sparse_moe.experts.{e}.{w}" for e in range(3) for w in ("w1", "w2"))
    for trial in range(60):
        leaves = LEAVES + (experts if trial % 2 else ())
        weights = [chance.random() for _ in range(3)]
        widths = {
            f"model.layers.{i}.{leaf}": chance.choices((2, 4, 8), weights)[0]
            for i in range(chance.choice((1, 2, 12)))
            for leaf in leaves
        }
        found = compact(widths)
        assert {module: found.of(module) for module in widths} == widths
        resolved = {}
        for module in widths:  # as a recipe does it: the last match counts
            bits = found.bits
            for pattern, value in found.overrides:
                bits = value if matches(module, pattern) else bits
            resolved[module] = bits
        assert resolved == widths


def test_a_star_that_reaches_into_another_family_is_not_used() -> None:
    """`a.*.b.c` matches `a.0.x.b.c` as well."""
    widths = {"a.0.b.c": 8, "a.1.b.c": 8, "a.0.x.b.c": 4, "a.1.x.b.c": 4, "a.0.y": 4, "a.1.y": 4}
    found = compact(widths)
    assert {module: found.of(module) for module in widths} == widths
