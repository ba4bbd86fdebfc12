"""Texts that follow a grammar, whatever the model would rather say."""

from __future__ import annotations

import functools
import json
import re
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import pytest

from quantflow import LLM, SamplingParams
from quantflow.engine.grammar import KEPT, Grammar, GrammarKind
from quantflow.errors import RequestError, ResourceError

DEMO = Path(__file__).parents[2] / "calib_data" / "demo_model"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 9},
        "sizes": {
            "type": "array",
            "items": {"type": "integer", "minimum": 3, "maximum": 40},
            "minItems": 1,
            "maxItems": 3,
        },
        "kind": {"enum": ["table", "índex", None]},
        "inner": {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}},
            "required": ["ok"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "sizes", "kind", "inner"],
    "additionalProperties": False,
}


def of(schema: Any) -> Grammar:
    return Grammar(GrammarKind.json_schema, json.dumps(schema))


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(DEMO, device="cpu", cache_bytes=2**25, max_batch_size=8, check=True)


def test_every_text_follows_the_schema(llm: LLM) -> None:
    params = [
        SamplingParams(max_tokens=200, temperature=t, seed=s, n=3, grammar=of(SCHEMA))
        for t in (0, 1, 3)
        for s in range(3)
    ]
    for output in llm.generate(["The table", "{", "词"] * 3, params):
        for completion in output.completions:
            jsonschema.validate(json.loads(completion.text), SCHEMA)
            assert completion.finish == "stop" and "\n" not in completion.text


def test_texts_of_one_request_go_their_own_ways(llm: LLM) -> None:
    output = llm.generate(
        "x", SamplingParams(max_tokens=200, temperature=2, seed=1, n=6, grammar=of(SCHEMA))
    )[0]
    assert len({c.text for c in output.completions}) > 3


def test_an_expression(llm: LLM) -> None:
    expression = r"[a-f]{2,4}(-\d){3}|né"
    params = [
        SamplingParams(
            max_tokens=40, temperature=2, seed=i, grammar=Grammar(GrammarKind.regex, expression)
        )
        for i in range(8)
    ]
    for output in llm.generate(["x"] * 8, params):
        assert re.fullmatch(expression, output.text)


def test_a_lark_grammar(llm: LLM) -> None:
    grammar = Grammar(GrammarKind.lark, 'start: "yes" | "no" " way"')
    params = [
        SamplingParams(max_tokens=9, temperature=5, seed=i, grammar=grammar) for i in range(12)
    ]
    assert {output.text for output in llm.generate(["x"] * 12, params)} == {"yes", "no way"}


GBNF = r"""root ::= item+ end # a list
item ::= "- " [^\r\n\u0085\u2028\x09"\]]{1,5} "\n"
end ::= "\u00e9\""
     | "\x41#|"
"""


def test_a_grammar_of_llama_cpps(llm: LLM) -> None:
    grammar = Grammar(GrammarKind.gbnf, GBNF)
    params = [
        SamplingParams(
            max_tokens=300, temperature=1.5, seed=i, grammar=grammar, logit_bias={3: 5.0}
        )
        for i in range(6)
    ]
    for output in llm.generate(["x"] * 6, params):
        assert re.match(r'(- [^\r\n\x85\u2028\t"\]]{1,5}\n)+', output.text)
        if output.completions[0].finish == "stop":
            assert re.fullmatch(r'(- [^\r\n\x85\u2028\t"\]]{1,5}\n)+(é"|A#\|)', output.text)
    words = Grammar(GrammarKind.gbnf, 'root ::= "yes" | # or\n "no" " way"')
    found = llm.generate(
        ["x"] * 12,
        [SamplingParams(max_tokens=9, temperature=5, seed=i, grammar=words) for i in range(12)],
    )
    assert {output.text for output in found} == {"yes", "no way"}


@pytest.mark.parametrize(
    "inner",
    [
        of({"enum": ["yes"]}),
        Grammar(GrammarKind.regex, '"yes"'),
        Grammar(GrammarKind.gbnf, 'root ::= ["] "yes\\""'),
    ],
)
def test_a_grammar_inside_another(llm: LLM, inner: Grammar) -> None:
    grammar = Grammar(inner.kind, inner.text, 'start: "<" @inner ">" | "no"')
    params = [
        SamplingParams(max_tokens=9, temperature=5, seed=i, grammar=grammar) for i in range(12)
    ]
    assert {output.text for output in llm.generate(["x"] * 12, params)} == {'<"yes">', "no"}


@pytest.mark.parametrize("around", ["", 'start: "<" @inner ">"'])
def test_a_grammar_arrives_as_it_was_sent(around: str) -> None:
    params = SamplingParams(grammar=Grammar(GrammarKind.regex, "a", around))
    assert SamplingParams(**json.loads(json.dumps(asdict(params)))) == params


@pytest.mark.parametrize(
    "more", [{"arround": ""}, {"around": 5}, {"text": None}, {"kind": "prolog"}]
)
def test_what_is_no_grammar_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="grammar"):
        SamplingParams(grammar={"kind": "regex", "text": "a", **more})  # type: ignore[arg-type]


def test_the_same_beside_others_and_after_preemption(llm: LLM) -> None:
    """The grammar's state goes with the text, not with its place in a batch."""
    alone = [
        llm.generate("x", SamplingParams(max_tokens=60, temperature=1, seed=s, grammar=of(SCHEMA)))[
            0
        ].completions
        for s in range(6)
    ]
    tight = LLM(
        DEMO,
        device="cpu",
        cache_bytes=300_000,
        block_size=16,
        max_batch_size=8,
        session_len=128,
        prefix_cache=False,
        check=True,
    )
    params = [
        SamplingParams(max_tokens=60, temperature=1, seed=s, grammar=of(SCHEMA) if s < 6 else None)
        for s in range(12)
    ]
    assert [o.completions for o in tight.generate(["x"] * 12, params)][:6] == alone
    assert tight.engine.scheduler.preemptions > 0


def test_penalties_and_biases_do_not_break_it(llm: LLM) -> None:
    digit = llm.encode("7", special=False)[-1]
    params = SamplingParams(
        max_tokens=200,
        temperature=1,
        seed=1,
        grammar=of(SCHEMA),
        repetition_penalty=1.3,
        presence_penalty=2,
        logit_bias={digit: 100.0},
    )
    jsonschema.validate(json.loads(llm.generate("x", params)[0].text), SCHEMA)


def test_logprobs_are_the_models_own(llm: LLM) -> None:
    params = SamplingParams(
        max_tokens=1, grammar=Grammar(GrammarKind.lark, 'start: "zebra"'), logprobs=0
    )
    (scored,) = llm.generate("The table", params)[0].completions[0].logprobs
    assert scored.rank > 1 and scored.logprob < -3


def test_a_text_that_is_cut_short(llm: LLM) -> None:
    completion = llm.generate("x", SamplingParams(max_tokens=3, grammar=of(SCHEMA)))[0].completions[
        0
    ]
    assert completion.finish == "length" and completion.text.startswith('{"name')


@pytest.mark.parametrize(
    "grammar",
    [
        of({"type": "wizard"}),
        of({"$ref": "http://example.com/schema"}),
        of({"$ref": "#/$defs/nothing"}),
        of({"not": {"type": "string"}}),
        of([1]),
        of(5),
        Grammar(GrammarKind.json_schema, "{"),
        Grammar(GrammarKind.json_schema, "[" * 5000),
        Grammar(GrammarKind.json_schema, '{"items":' * 4000 + "{}" + "}" * 4000),
        Grammar(GrammarKind.regex, "("),
        Grammar(GrammarKind.lark, "start: nothing"),
        Grammar(GrammarKind.lark, "start: a\na: b\nb: a"),
        Grammar(GrammarKind.lark, 'start: "a" start'),
        Grammar(GrammarKind.lark, "start: A start\nA: /a/"),
        Grammar(GrammarKind.gbnf, 'root ::= "a" root'),
        Grammar(GrammarKind.lark, 'start: j\nj: %json {"$ref":"#"}'),
        Grammar(GrammarKind.gbnf, "root ::= nothing"),
        Grammar(GrammarKind.gbnf, 'other ::= "x"'),
        Grammar(GrammarKind.gbnf, 'root ::= "\\U00110000"'),
        Grammar(GrammarKind.gbnf, "root ::= " + "(" * 5000),
        Grammar(
            GrammarKind.gbnf, "root ::= a0\n" + "".join(f"a{i} ::= a{i + 1}\n" for i in range(3500))
        ),
    ],
)
def test_grammars_that_are_none_are_refused_soon(llm: LLM, grammar: Grammar) -> None:
    began = time.monotonic()
    with pytest.raises(RequestError, match="grammar"):
        llm.generate("x", SamplingParams(max_tokens=5, grammar=grammar))
    assert time.monotonic() - began < 30
    assert not llm.engine.has_work


def test_what_is_too_hard_ends_that_text_alone(llm: LLM) -> None:
    hard = of({"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(1500)}})
    with pytest.raises((RequestError, ResourceError)):
        llm.generate(
            ["x", "x"],
            [
                SamplingParams(max_tokens=20, temperature=1, seed=1, grammar=hard),
                SamplingParams(max_tokens=5),
            ],
        )
    assert llm.generate("x", SamplingParams(max_tokens=5))[0].text


def test_a_matcher_that_fails_is_not_taken_for_an_end(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llguidance's mask allows the end alone once its limits are met: the text is not complete
    then."""
    limits = functools.partial(llguidance.LLParserLimits, step_max_items=60)
    monkeypatch.setattr(
        llguidance, "LLParserLimits", lambda **given: limits(**{"verbose_errors": False})
    )
    grammar = Grammar(GrammarKind.lark, 'start: ("a" | "b" | "ab" | "ba" | "bb" | "aa")* "!"')
    with pytest.raises(ResourceError) as failed:
        for seed in range(5):
            text = llm.generate(
                "x", SamplingParams(max_tokens=60, temperature=3, seed=seed, grammar=grammar)
            )[0].text
            assert text.endswith("!"), text
    assert "not finite" not in str(failed.value)


def test_what_does_not_go_together() -> None:
    for wrong in ({"ignore_eos": True}, {"min_tokens": 5}):
        with pytest.raises(RequestError, match="grammar"):
            SamplingParams(grammar=of(SCHEMA), **wrong)
    for value in ("{}", {"kind": "json_schema"}, {"kind": "x", "text": "y"}, 5):
        with pytest.raises(RequestError, match="grammar"):
            SamplingParams(grammar=value)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="characters"):
        Grammar(GrammarKind.json_schema, "x" * 10**6)
    assert SamplingParams(grammar={"kind": "regex", "text": "a"}).grammar == Grammar(
        GrammarKind.regex, "a"
    )  # type: ignore[arg-type]


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    llm = LLM(tmp_path / "model", device="cpu")
    with pytest.raises(RequestError, match="tokenizer"):
        llm.generate([1, 2], SamplingParams(grammar=of(SCHEMA)))


def test_compiled_grammars_are_kept_but_not_all(llm: LLM) -> None:
    grammars = llm.engine.grammars
    assert grammars
    for i in range(KEPT + 10):
        grammars.matcher(Grammar(GrammarKind.regex, f"a{{{i + 1}}}"))
    assert len(grammars._compiled) == KEPT
