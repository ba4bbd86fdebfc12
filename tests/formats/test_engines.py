"""What engines will not load of a checkpoint that is right. Which engine refuses what was read in
their code, or seen in a run (docs/engines.md); the rules here are written down a second time, as a
table."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from transformers.quantizers.quantizers_utils import should_convert_module

from quantflow.formats import FORMATS
from quantflow.formats.base import ConfigRequest
from quantflow.formats.engines import BITSANDBYTES, HEADS, LLAMA_CPP, LOADS, loads
from quantflow.formats.weight import Weight
from quantflow.pipeline.starter import TARGETS
from quantflow.quant.numbers import NUMBERS
from quantflow.quant.numbers.base import BITS
from quantflow.quant.scheme import Scheme
from tests.helpers.runs import invoke

ROOT = Path(__file__).parents[2]

PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
MODULES = [f"model.layers.{i}.{part}" for i in range(12) for part in PARTS]
W4, W4A, W8 = Scheme(4, 128, True), Scheme(4, 128, False), Scheme(8, 128, True)
FUSING, VLLM, LMDEPLOY, GPTQMODEL, TRANSFORMERS = (
    "vLLM 0.32 and SGLang",
    "vLLM 0.32",
    "LMDeploy 0.18 (TurboMind)",
    "GPTQModel 7.7",
    "transformers 5.23",
)


def doubting(
    form: str,
    scheme: Scheme,
    changes: dict[str, Scheme | None] | None = None,
    *,
    act_order: bool = False,
) -> list[str]:
    """The engines. changes: end of a name -> another scheme, or None for what stays in 16 bits."""
    schemes = {
        m: next((own for end, own in (changes or {}).items() if m.endswith(end)), scheme)
        for m in MODULES
    }
    modules = {m: own for m, own in schemes.items() if own is not None}
    ignored = ["lm_head", *(m for m, own in schemes.items() if own is None)]
    return sorted(
        {
            problem.where
            for problem in FORMATS[form].doubts(
                ConfigRequest(modules, list(ignored), W4A, act_order=act_order)
            )
        }
    )


@pytest.mark.parametrize(
    ("form", "scheme", "expected"),
    [
        ("compressed-tensors", W4, []),
        ("compressed-tensors", W4A, []),
        ("compressed-tensors", Scheme(4, 32, False), []),
        ("compressed-tensors", Scheme(4, 64, True), [LMDEPLOY]),
        ("compressed-tensors", W8, [LMDEPLOY]),
        ("compressed-tensors", Scheme(4, -1, False), [LMDEPLOY]),
        # Marlin has uint4 alone with zero points
        ("compressed-tensors", Scheme(8, 128, False), [LMDEPLOY, VLLM]),
        ("compressed-tensors", Scheme(4, 16, True), [LMDEPLOY, VLLM]),
        *(
            ("compressed-tensors", Scheme(bits, 128, True), [LMDEPLOY, VLLM])
            for bits in (2, 3, 5, 6, 7)
        ),
        ("awq", W4, []),
        ("awq", W4A, []),
        ("awq", Scheme(4, 64, False), [LMDEPLOY]),
        ("gptq", W4, []),
        ("gptq", W4A, [GPTQMODEL, LMDEPLOY, VLLM]),
        ("gptq", W8, [LMDEPLOY]),
        ("gptq", Scheme(8, -1, True), [LMDEPLOY]),
        ("gptq", Scheme(3, 128, True), [LMDEPLOY, VLLM]),
        ("gptq", Scheme(4, 16, True), [LMDEPLOY, VLLM]),
        ("gptq_v2", W4, [LMDEPLOY]),  # misread in silence
        ("gptq_v2", W4A, [LMDEPLOY, VLLM]),
        ("bitsandbytes", Scheme(4, 64, True, "nf4"), [VLLM]),
        ("gguf", Scheme(4, 32, True), []),
        ("turbomind", W4A, []),
        ("huggingface", W4A, []),
    ],
)
def test_who_does_not_load_it(form: str, scheme: Scheme, expected: list[str]) -> None:
    assert doubting(form, scheme) == expected


def test_a_group_index() -> None:
    assert doubting("gptq", W4, act_order=True) == [LMDEPLOY, VLLM]
    # vLLM: with one group a row the order means nothing
    assert doubting("gptq", Scheme(8, -1, True), act_order=True) == [LMDEPLOY]


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_parts_that_engines_fuse(form: str) -> None:
    def fusing(changes: dict[str, Scheme | None]) -> bool:
        return FUSING in doubting(form, W4, changes)

    assert (
        fusing({".k_proj": None})
        and fusing({".k_proj": W8})
        and fusing({".up_proj": Scheme(4, 64, True)})
    )
    assert fusing({"layers.3.mlp.gate_proj": None}) and fusing(
        {".q_proj": W8, ".k_proj": W8, ".v_proj": None}
    )
    assert not fusing({".down_proj": W8, ".o_proj": None})
    assert not fusing({".q_proj": None, ".k_proj": None, ".v_proj": None})
    assert not fusing({"layers.1.mlp.gate_proj": W8, "layers.1.mlp.up_proj": W8})


class Unsearched(list[str]):
    def __contains__(self, item: object) -> bool:
        raise AssertionError("searched from end to end for every module")


def test_a_long_list_of_ignored_modules_is_not_searched_for_each() -> None:
    modules = {m: W4 for m in MODULES if "q_proj" in m}
    assert (
        FORMATS["gptq"]
        .doubts(ConfigRequest(modules, Unsearched(m for m in MODULES if m not in modules), W4A))[0]
        .where
        == FUSING
    )


def test_widths_that_need_more_than_the_engine_are_said_with_what_they_need() -> None:
    for scheme, needed in (
        (Scheme(3, 128, True), "Humming"),
        (Scheme(8, 64, False), "Hopper"),
        (Scheme(4, 16, True), "Exllama"),
    ):
        (said,) = (
            str(p)
            for p in FORMATS["compressed-tensors"].doubts(ConfigRequest({"m": scheme}, [], scheme))
            if p.where == VLLM
        )
        assert f"loads {scheme} only" in said and needed in said
        assert ("weights.symmetric: true" in said) == (not scheme.symmetric)


def test_no_recipe_for_an_engine_is_one_that_it_is_said_not_to_load() -> None:
    for name, target in TARGETS.items():
        offered = [scheme for bits in BITS for scheme in target.schemes(bits)]
        assert {scheme.bits for _, scheme in offered} == {
            "lmdeploy": {4},
            "transformers": set(BITS),
        }.get(name, {4, 8})
        for way, scheme in offered:
            assert not FORMATS[way.format].check(Weight("m", (256, 256), scheme))
            assert target.engine not in [
                problem.where
                for problem in FORMATS[way.format].doubts(ConfigRequest({"m": scheme}, [], scheme))
            ]


def test_an_engine_loads_the_numbers_that_it_is_said_to() -> None:
    """Eight bits a row of integers are not those of another kind."""
    eight, nf4 = Scheme(8, -1, True), Scheme(4, 64, True, "nf4")
    assert loads(VLLM, "compressed-tensors", eight) and not loads(
        VLLM, "compressed-tensors", replace(eight, kind="nf4")
    )
    assert loads(BITSANDBYTES, "bitsandbytes", nf4) and not loads(
        BITSANDBYTES, "bitsandbytes", replace(nf4, kind="integer")
    )
    assert loads(TRANSFORMERS, "huggingface", nf4) and loads(
        LLAMA_CPP, "gguf", Scheme(4, 32, False, "minimum")
    )
    assert {kind for row in LOADS for kind in row.kinds} == set(NUMBERS)


def test_the_pages_table_and_the_commands_are_these() -> None:
    """And every row is of a format and of widths that the format holds."""
    lines = [
        line
        for line in (ROOT / "docs" / "engines.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    cells = [("format", *HEADS), *((f"`{row.format}`", *row.cells) for row in LOADS)]
    assert lines[: len(cells)] == [f"| {' | '.join(row)} |" for row in cells]
    found = json.loads(invoke("formats", "--json").stdout)
    assert [row for ability in found.values() for row in ability["engines"]] == [
        json.loads(json.dumps(asdict(row))) for row in LOADS
    ]
    shown = " ".join(invoke("formats").stdout.split())
    assert all(row.engine in shown for row in LOADS)
    for row in LOADS:
        form = FORMATS[row.format]
        for bits in row.bits:
            for group in row.groups or (64,):
                scheme = Scheme(bits, group, True, row.kinds[0] if row.kinds else "integer")
                if row.format != "gguf":
                    assert not form.check(
                        Weight("m", (256, 256), scheme, row.index and form.holds_index)
                    ), row


def test_the_sentence_of_unlike_parts() -> None:
    changes = {f"layers.{i}.self_attn.k_proj": None for i in (0, 4)}
    modules = {m: W4 for m in MODULES if not m.endswith(tuple(changes))}
    (problem,) = FORMATS["compressed-tensors"].doubts(
        ConfigRequest(modules, [m for m in MODULES if m not in modules], W4A)
    )
    assert (
        str(problem)
        == "vLLM 0.32 and SGLang: does not load unlike parts of what it fuses: q_proj W4 g128"
        " symmetric, k_proj in 16 bits, v_proj W4 g128 symmetric (model.layers.0.self_attn and 1"
        " more); expected one scheme, or none, for all of them. Match all of q_proj, k_proj,"
        " v_proj in weights.ignore and overrides, or none"
    )


def test_unlike_parts_of_awq_are_those_left_out() -> None:
    """Symmetric or not is no difference there: every weight has zero points."""
    assert doubting("awq", W4, {".k_proj": W4A}) == []
    assert doubting("awq", W4, {".k_proj": None}) == [FUSING]


def test_unlike_schemes_with_zero_points_in_transformers() -> None:
    assert doubting("compressed-tensors", W4A, {".down_proj": Scheme(4, 32, False)}) == [
        LMDEPLOY,
        TRANSFORMERS,
    ]
    assert doubting("compressed-tensors", W4, {".down_proj": Scheme(4, 32, True)}) == [LMDEPLOY]


def test_what_awq_skips_is_skipped_by_the_names_that_each_reader_looks_for() -> None:
    """transformers by an expression or an ending, vLLM and SGLang by a part of the name; SGLang's
    modules are already fused."""
    left = (
        "layers.1.self_attn.q_proj",
        "layers.1.self_attn.k_proj",
        "layers.1.self_attn.v_proj",
        "layers.11.mlp.down_proj",
    )
    modules = {m: W4A for m in MODULES if not m.endswith(left)}
    ignored = ["lm_head", *(m for m in MODULES if m not in modules)]
    skipped = FORMATS["awq"].quantization_config(ConfigRequest(modules, ignored, W4A))[
        "modules_to_not_convert"
    ]
    for module in [*MODULES, "lm_head"]:
        assert should_convert_module(module, skipped) == (module in modules), module
        assert any(name in module for name in skipped) == (module not in modules), module
    fused = {
        f"model.layers.{i}.{part}": i == 1 and part.endswith("qkv_proj")
        for i in range(12)
        for part in ("self_attn.qkv_proj", "mlp.gate_up_proj")
    }
    for module, expected in fused.items():
        assert any(name in module for name in skipped) == expected, module
