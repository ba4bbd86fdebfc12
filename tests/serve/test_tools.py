"""Tools: rendered into the template, read out of the text, and called when they must be."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import openai
import pytest
from llguidance import LLMatcher, LLTokenizer
from pydantic import BaseModel, Field
from tokenizers import Tokenizer

from quantflow.serve.grammars import Constraint
from quantflow.serve.requests import Function
from quantflow.serve.tool_use import Choice, tool_use
from quantflow.serve.tools import (
    FORMATS,
    Call,
    Callee,
    Opening,
    Reading,
    ToolFormat,
    ToolReader,
    apart,
    lark,
    tool_format,
)
from quantflow.tokenizers.dialogue import ChatTemplate
from tests.helpers.serving import DEMO, Running, serving

HERMES, MISTRAL, LLAMA3 = (replace(format, functions=frozenset({"f"})) for format in FORMATS)
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"$ref": "#/$defs/unit"}},
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"unit": {"enum": ["C", "F"]}},
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "The weather", "parameters": WEATHER},
    },
    {"type": "function", "function": {"name": "time"}},
]
WIZARD = {"type": "function", "function": {"name": "f", "parameters": {"type": "wizard"}}}
MESSAGES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or []"
    " %}{{ c | tojson }}{% endfor %}"
)
TEMPLATES = {
    "hermes": (
        "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}Answer in"
        " <tool_call></tool_call>{% endif %}"
    ),
    "mistral": (
        "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS] answer with"
        " [TOOL_CALLS]{% endif %}"
    ),
    "llama3": "{% if tools %}{{ tools | tojson }} answer with <|python_tag|>{% endif %}",
}
SEVERAL = ("mistral",)  # has its words for tools in a template of its own


@pytest.fixture(scope="module", params=TEMPLATES)
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("tools") / "model"
    shutil.copytree(DEMO, folder)
    end = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    several = request.param in SEVERAL
    (folder / "chat_template.jinja").write_text(
        (TEMPLATES[request.param] if not several else "") + MESSAGES + end
    )
    if several:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(
            TEMPLATES[request.param] + MESSAGES + end
        )
    with serving(folder, check=True) as found:
        yield found


def read(format: Any, *pieces: str) -> tuple[str, list[Call]]:
    reader = ToolReader(format)
    return apart([part for piece in pieces for part in reader.add(piece)] + reader.finish())


CALL = '{"name": "f", "arguments": {"x": [1, "}"]}}'
F = Call("f", '{"x": [1, "}"]}')
MARKS = Call(
    "f",
    json.dumps(
        {"x": '</tool_call>\\"\\</tool_call>[TOOL_CALLS]<|python_tag|>\n</tool_call><tool_call>\\'}
    ),
)
MARKED = f'{{"name": "f", "arguments": {MARKS.arguments}}}'


@pytest.mark.parametrize(
    ("format", "text", "shown", "calls"),
    [
        (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", [F]),
        (
            HERMES,
            f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call>",
            "Let me see.\n",
            [F, F],
        ),
        (HERMES, "a < b and <tool", "a < b and <tool", []),
        (HERMES, "plain", "plain", []),
        (HERMES, "<tool_call>no json</tool_call> then", "<tool_call>no json</tool_call> then", []),
        (HERMES, '<tool_call>{"x": 1}</tool_call>', '<tool_call>{"x": 1}</tool_call>', []),
        (HERMES, f"<tool_call>{CALL}", "", [F]),  # it stopped before the end
        (HERMES, f"<tool_call>\n{CALL}\n</to", "", [F]),
        (HERMES, '<tool_call>{"x": 1}</to', '<tool_call>{"x": 1}</to', []),
        (
            HERMES,
            f"<tool_call>\n{MARKED}\n</tool_call>\n<tool_call>{CALL}</tool_call>.",
            ".",
            [MARKS, F],
        ),
        (HERMES, f"<tool_call>{MARKED}", "", [MARKS]),
        (HERMES, f"<tool_call>{MARKED[:-9]}", f"<tool_call>{MARKED[:-9]}", []),
        # No JSON: the first end is the end, and what follows is read.
        (
            HERMES,
            f'<tool_call>{{"a</tool_call> " <tool_call>{CALL}</tool_call>',
            '<tool_call>{"a</tool_call> " ',
            [F],
        ),
        (
            HERMES,
            f'<tool_call>{{"a</tool_call>\n<tool_call>{CALL}</tool_call>',
            '<tool_call>{"a</tool_call>\n',
            [F],
        ),
        (HERMES, '<tool_call>{"a</tool_call> b', '<tool_call>{"a</tool_call> b', []),
        (
            HERMES,
            '<tool_call>{"</tool_call>" 1}</tool_call> b',
            '<tool_call>{"</tool_call>" 1}</tool_call> b',
            [],
        ),
        (MISTRAL, f"[TOOL_CALLS][{MARKED}]", "", [MARKS]),
        (LLAMA3, MARKED, "", [MARKS]),
        (HERMES, '<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
        (HERMES, '<tool_call>{"name": "f"}</tool_call>', "", [Call("f", "{}")]),
        (MISTRAL, f"[TOOL_CALLS][{CALL}, {CALL}]", "", [F, F]),
        (MISTRAL, f"Sure. [TOOL_CALLS] [{CALL}]", "Sure. ", [F]),
        (MISTRAL, "[TOOL", "[TOOL", []),
        (LLAMA3, '{"name": "f", "parameters": {"y": "é"}}', "", [Call("f", '{"y": "é"}')]),
        (LLAMA3, '<|python_tag|>{"name": "f", "parameters": {}}', "", [Call("f", "{}")]),
        (LLAMA3, '{"a set": 1}', '{"a set": 1}', []),
        # no function of that name
        (LLAMA3, '{"name": "John", "parameters": {}}', '{"name": "John", "parameters": {}}', []),
        (LLAMA3, "It is {so}.", "It is {so}.", []),
        (
            LLAMA3,
            'It is {"name": "f", "parameters": {}}',
            'It is {"name": "f", "parameters": {}}',
            [],
        ),
    ],
)
def test_calls_are_read_however_the_text_is_cut(
    format: Any, text: str, shown: str, calls: list[Call]
) -> None:
    assert read(format, text) == (shown, calls)
    assert read(format, *text) == (shown, calls)
    for cut in range(1, len(text)):
        assert read(format, text[:cut], text[cut:]) == (shown, calls)


def test_what_is_no_call_is_shown_as_soon_as_that_is_sure() -> None:
    reader = ToolReader(HERMES)
    assert [apart(reader.add(piece))[0] for piece in ("a <to", "ol", " b")] == ["a ", "", "<tool b"]


@pytest.mark.parametrize(
    "piece",
    [
        '<tool_call>{"</tool_call>',
        '<tool_call>{"</tool_call> " ',
        "</tool_call><tool_call>{",
        '\\"</tool_call>',
    ],
)
def test_reading_takes_the_time_of_the_texts_length(piece: str) -> None:
    """Four times as much takes about four times as long."""

    def seconds(times: int) -> float:
        reader, began = ToolReader(HERMES), time.process_time()
        text = '<tool_call>{"' + piece * times
        parts = [
            part for at in range(0, len(text), 5) for part in reader.add(text[at : at + 5])
        ] + reader.finish()
        assert "".join(part for part in parts if isinstance(part, str)) == text
        return time.process_time() - began

    assert seconds(8000) < 10 * max(min(seconds(2000) for _ in range(3)), 0.01)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_text_and_calls_keep_their_order(size: int) -> None:
    """However it comes; in pieces, the texts between two calls are in pieces, too."""
    text = (
        f"a <tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>"
        f" b<tool_call>{CALL}</tool_call> c"
    )
    for most, expected in ((None, ["a ", F, F, " b", F, " c"]), (1, ["a ", F, " b c"])):
        reading, found = Reading(HERMES, most), list[Any]()
        for at in range(0, len(text), size):
            for part in reading.add(text[at : at + size], last=at + size >= len(text)):
                if isinstance(part, str) and found and isinstance(found[-1], str):
                    found[-1] += part
                else:
                    found.append(part)
        assert found == expected and reading.calls == sum(
            isinstance(part, Call) for part in expected
        )


def test_a_brace_in_the_middle_holds_nothing_back() -> None:
    reader = ToolReader(LLAMA3)
    assert (
        "".join(apart(reader.add(piece))[0] for piece in ("Use ", "{", "x} then more"))
        == "Use {x} then more"
    )


def test_definitions_of_two_functions_do_not_mix(running: Running) -> None:
    def tool(name: str, word: str) -> Any:
        parameters = {
            "type": "object",
            "properties": {"x": {"$ref": "#/$defs/u"}},
            "required": ["x"],
            "$defs": {"u": {"enum": [word]}},
        }
        return {
            "type": "function",
            "function": {"name": name, "parameters": {**parameters, "additionalProperties": False}},
        }

    for name, word in (("a", "AAA"), ("b", "BBB")):
        named = {"type": "function", "function": {"name": name}}
        for choice in (named, "required"):
            found = ask(
                running,
                tools=[tool("a", "AAA"), tool("b", "BBB")],
                tool_choice=choice,
                parallel_tool_calls=False,
            ).json
            call = found["choices"][0]["message"]["tool_calls"][0]["function"]
            assert json.loads(call["arguments"]) == {"x": {"a": "AAA", "b": "BBB"}[call["name"]]}
            assert choice == "required" or json.loads(call["arguments"]) == {"x": word}


def test_a_format_is_known_by_its_template() -> None:
    def of(template: str) -> str | None:
        found = tool_format(ChatTemplate({"default": template}))
        return found.name if found else None

    assert {name: of(template) for name, template in TEMPLATES.items()} == {
        name: name for name in TEMPLATES
    }
    assert of("{{ messages }}") is None and tool_format(None) is None
    assert of("{% if tools %}{{ tools }}{% endif %}") is None  # a way that we do not know
    assert of("{% if tools %}<tool_call><function=x>{% endif %}") is None
    assert of("{% if tools %}[TOOL_CALLS]name[ARGS]{% endif %}") is None
    # Of several templates, the one that is rendered with tools.
    assert (
        tool_format(ChatTemplate({"default": "{{ messages }}", "tool_use": TEMPLATES["mistral"]}))
        == FORMATS[1]
    )
    assert (
        tool_format(ChatTemplate({"default": TEMPLATES["hermes"], "tool_use": TEMPLATES["llama3"]}))
        == FORMATS[2]
    )
    assert tool_format(ChatTemplate({"tool_use": TEMPLATES["hermes"]})) == FORMATS[0]


def strict(parameters: Any, name: str = "f", strict: bool | None = True) -> Any:
    return {
        "type": "function",
        "function": {"name": name, "parameters": parameters, "strict": strict},
    }


def allowed(mode: str, *names: str) -> Any:
    return {
        "type": "allowed_tools",
        "allowed_tools": {
            "mode": mode,
            "tools": [{"type": "function", "function": {"name": n}} for n in names],
        },
    }


def preferring(running: Running, *beginnings: str) -> dict[str, float]:
    """Biases that make a text begin with one of these where it can."""
    return {str(running.service.text.encode(text)[-1]): 100.0 for text in beginnings}


def ask(running: Running, **body: Any) -> Any:
    return running.chat(**{"tools": TOOLS, "max_tokens": 200, "temperature": 1, "seed": 5, **body})


def test_tools_are_rendered(running: Running) -> None:
    with_tools, without = (
        running.chat(**body).json["usage"]["prompt_tokens"] for body in ({"tools": TOOLS}, {})
    )
    assert with_tools > without + 20
    assert running.chat(tools=TOOLS, tool_choice="none").json["usage"]["prompt_tokens"] == without
    answer = running.chat(tools=TOOLS).json["choices"][0]  # this model was not trained to call any
    assert (
        answer["message"]["content"]
        and answer["finish_reason"] == "length"
        and "tool_calls" not in answer["message"]
    )


def test_a_call_that_must_be_made_follows_its_schema(running: Running) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        for seed in range(4):
            found = ask(running, tool_choice=choice, seed=seed, parallel_tool_calls=False).json[
                "choices"
            ][0]
            (call,) = found["message"]["tool_calls"]
            assert found["finish_reason"] == "tool_calls" and found["message"]["content"] is None
            assert call["type"] == "function" and call["id"]
            if call["function"]["name"] == "weather":
                arguments = json.loads(call["function"]["arguments"])
                assert (
                    set(arguments) == {"city", "unit"}
                    and arguments["unit"] in ("C", "F")
                    and len(arguments["city"]) <= 8
                )
            else:
                assert choice == "required" and call["function"]["name"] == "time"


def test_a_function_that_is_named_is_called_once(running: Running) -> None:
    for parallel in ({}, {"parallel_tool_calls": True}, {"parallel_tool_calls": False}):
        found = ask(
            running,
            tool_choice={"type": "function", "function": {"name": "weather"}},
            max_tokens=400,
            **parallel,
        ).json
        (choice,) = found["choices"]
        assert [c["function"]["name"] for c in choice["message"]["tool_calls"]] == ["weather"]
        assert choice["finish_reason"] == "tool_calls" and found["usage"]["completion_tokens"] < 120


def test_only_allowed_tools_are_called(running: Running) -> None:
    for seed in range(3):
        found = ask(
            running,
            tool_choice=allowed("required", "time"),
            parallel_tool_calls=False,
            seed=seed,
            max_tokens=60,
        ).json["choices"][0]
        assert all(c["function"]["name"] == "time" for c in found["message"].get("tool_calls", ()))
        assert found["finish_reason"] == "length" or found["message"]["tool_calls"]
    both = [
        running.chat(tools=TOOLS, **body).json["usage"]["prompt_tokens"]
        for body in ({}, {"tool_choice": allowed("auto", "time")})
    ]
    assert both[0] == both[1]  # the model sees them all, and the prefix cache knows them


def test_strict_tools_leave_the_text_free_but_not_their_calls(running: Running) -> None:
    tools = [strict(WEATHER, "weather")]
    answer = ask(running, tools=tools, max_tokens=20).json["choices"][0]
    assert (
        answer["finish_reason"] == "length"
        and answer["message"]["content"]
        and "tool_calls" not in answer["message"]
    )
    if running.service.tools == FORMATS[2]:  # a brace begins a call there
        answer = ask(running, tools=tools, logit_bias=preferring(running, "{", '{"')).json[
            "choices"
        ][0]
        jsonschema.validate(
            json.loads(answer["message"]["tool_calls"][0]["function"]["arguments"]), WEATHER
        )


def test_an_answer_is_a_call_or_follows_its_format(running: Running) -> None:
    shape = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": shape, "strict": True}}
    seen = set()
    for seed in range(6):
        bias = preferring(running, *(("{", '{"') if seed % 2 else ("<", "[")))
        tools = [strict(WEATHER, "weather")]
        answer = ask(
            running,
            tools=tools,
            response_format=format,
            seed=seed,
            logit_bias=bias,
            parallel_tool_calls=False,
        )
        assert answer.status == 200, answer.body
        choice = answer.json["choices"][0]
        calls = choice["message"].get("tool_calls")
        seen.add(bool(calls))
        if calls:
            jsonschema.validate(json.loads(calls[0]["function"]["arguments"]), WEATHER)
            assert (
                choice["finish_reason"] == "tool_calls"
                and len(calls) == 1
                and choice["message"]["content"] is None
            )
        else:
            jsonschema.validate(json.loads(choice["message"]["content"]), shape)
            assert choice["finish_reason"] == "stop"
    assert seen == {True, False} or running.service.tools == FORMATS[2]
    word = ask(running, guided_choice=["yes"], logit_bias=preferring(running, "y", "yes")).json[
        "choices"
    ][0]["message"]["content"]
    assert word == "yes"


class Weather(BaseModel):
    city: Annotated[str, Field(max_length=8)]
    unit: Literal["C", "F"]


def test_the_openai_clients_own_helpers(running: Running) -> None:
    """It sends its functions as strict, and checks what comes back against the classes that they
    were made of."""
    client = openai.OpenAI(base_url=f"{running.address}/v1", api_key="x", max_retries=0)
    tool = openai.pydantic_function_tool(Weather)
    assert tool["function"]["strict"] is True
    given: Any = {
        "model": "m",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 200,
        "tools": [tool],
    }
    named: Any = {"type": "function", "function": {"name": "Weather"}}
    (call,) = (
        client.chat.completions.parse(**given, tool_choice=named).choices[0].message.tool_calls
        or ()
    )
    assert isinstance(call.function.parsed_arguments, Weather)
    with client.chat.completions.stream(
        **given, tool_choice="required", parallel_tool_calls=False
    ) as stream:
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Weather)
    assert client.chat.completions.create(**{**given, "max_tokens": 8}).choices[0].message.content


def test_a_stream_of_a_call(running: Running) -> None:
    whole = ask(running, tool_choice="required", parallel_tool_calls=False).json["choices"][0]
    events = [
        e["choices"][0]
        for e in ask(running, tool_choice="required", parallel_tool_calls=False, stream=True).events
    ]
    (chunk,) = [call for e in events for call in e["delta"].get("tool_calls", ())]
    assert (
        chunk["index"] == 0 and chunk["function"] == whole["message"]["tool_calls"][0]["function"]
    )
    assert events[-1]["finish_reason"] == "tool_calls" and not any(
        e["delta"].get("content") for e in events
    )


def test_a_dialogue_with_calls_goes_on(running: Running) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny."},
    ]
    assert running.chat(messages=messages, tools=TOOLS).status == 200


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["[" + "[]," * 40_000 + "0]"] * 2, "lists and objects"),
        (["[" + "0," * 600_000 + "0]"] * 2, "values"),
        (["[" * 200 + "]" * 200], "deep"),
        (["{}", "[1"], "expected JSON"),
    ],
)
def test_the_arguments_of_calls_have_no_more_parts_than_a_body(
    running: Running, arguments: list[str], words: str
) -> None:
    calls = [
        {"id": f"c{n}", "type": "function", "function": {"name": "f", "arguments": text}}
        for n, text in enumerate(arguments)
    ]
    answer = running.chat(
        messages=[
            {"role": "user", "content": "x"},
            *({"role": "assistant", "tool_calls": [c]} for c in calls),
        ]
    )
    assert (
        answer.status == 400
        and answer.error["param"] == "messages"
        and words in answer.error["message"]
    ), answer.error


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "nothing"}}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": allowed("auto", "time")}, "tool_choice"),
        ({"tool_choice": allowed("auto", "time", "nothing")}, "tool_choice"),
        ({"tool_choice": allowed("none", "time")}, "tool_choice.allowed_tools.mode"),
        ({"tool_choice": {"type": "custom", "function": {"name": "x"}}}, "tool_choice.type"),
        ({"tools": [*TOOLS, {"type": "custom", "custom": {"name": "x"}}]}, "tools[2]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [*TOOLS, TOOLS[1]]}, "tools"),
        ({"tools": [strict({"$ref": "#"})]}, "tools"),
        ({"tools": [strict({"$ref": "#"}, strict=None)], "tool_choice": "required"}, "tools"),
        ({"tools": [strict({"type": "wizard"})]}, "tools"),
        ({"tools": [strict(WEATHER)], "ignore_eos": True}, "tools"),
        ({"tools": [strict({"type": "object", "description": "y" * 70000})]}, "tools"),
        ({"response_format": {"type": "regex", "regex": "("}}, "response_format"),
        ({"response_format": {"type": "regex", "regex": "a"}, "guided_regex": "b"}, "guided_regex"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": TOOLS * 65}, "tools"),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"type": "wizard"}},
                    }
                ],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
)
def test_what_is_refused(running: Running, body: Any, param: str) -> None:
    answer = ask(running, **body)
    assert answer.status == 400 and answer.error["param"] == param, answer.error


def test_a_template_is_the_models_alone(running: Running, tmp_path: Path) -> None:
    for name, code in (
        ("chat_template", "unsupported_parameter"),
        ("template", "unknown_parameter"),
        ("chat_template_kwargs", "invalid_value"),
    ):
        assert running.chat(**{name: "{{ 7 * 7 }}"}).error["code"] == code


def test_definitions_that_are_none(running: Running) -> None:
    for wrong in (5, [1], None, "abc"):
        tool = {
            "type": "function",
            "function": {"name": "f", "parameters": {"type": "object", "$defs": wrong}},
        }
        assert ask(running, tools=[tool], tool_choice="required").status in (200, 400)


SOME = {
    "type": "object",
    "properties": {"x": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
}
CALLED = {
    "hermes": '{begin}\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>',
    "mistral": '{begin}[{{"name": "f", "arguments": {arguments}}}]',
    "llama3": '{begin}{{"name": "f", "parameters": {arguments}}}',
}
SPECIAL = "<|im_start|>"  # of this tokenizer


@pytest.fixture(scope="module")
def follows() -> Callable[[str, str], bool]:
    """Whether a text follows a grammar and may end there."""
    content = (DEMO / "tokenizer.json").read_text()
    size = Tokenizer.from_str(content).get_vocab_size()
    tokenizer = LLTokenizer(
        content, n_vocab=size, eos_token=[Tokenizer.from_str(content).token_to_id("<|im_end|>")]
    )

    def follows(grammar: str, text: str) -> bool:
        matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        tokens = tokenizer.tokenize_str(text, parse_special=True)
        return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())

    return follows


def test_one_call_ends_an_answer_where_no_more_are_wanted(
    running: Running, follows: Callable[[str, str], bool]
) -> None:
    format = running.service.tools
    assert format is not None
    call = CALLED[format.name].format(begin=format.begin, arguments='{"x": 1}')
    grammars = [
        tool_use(
            running.service,
            [Function(name="f", parameters=SOME)],
            Choice(),
            parallel=parallel,
            answer=Constraint(None, ""),
        ).constraint.grammar
        for parallel in (True, False)
    ]
    assert grammars[0] is None and (grammars[1] is None) == format.bare
    if grammars[1]:
        texts = ("plain", call, f"First: {call}", f"{call}\n{call}", f"{call} and more")
        assert [follows(grammars[1].text, text) for text in texts] == [True] * 3 + [False] * 2


@pytest.mark.parametrize("special", [False, True], ids=["as text", "as a token"])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_what_texts_with_calls_may_be(
    format: ToolFormat, special: bool, follows: Callable[[str, str], bool]
) -> None:
    token = (
        Tokenizer.from_file(str(DEMO / "tokenizer.json")).token_to_id(SPECIAL) if special else None
    )
    begin = SPECIAL if special else format.begin
    call, wrong, tight = (
        CALLED[format.name].format(begin=begin, arguments=x)
        for x in ('{"x": 1}', '{"y": 1}', '{"x":1}')
    )
    for most, opening in itertools.product((1, 3), Opening):
        if opening == Opening.answer:
            continue  # needs another grammar inside
        grammar = lark(format, [Callee("f", SOME), Callee("g", None)], token, opening, most=most)
        free = opening == Opening.text
        assert (
            follows(grammar, call)
            and follows(grammar, tight)
            and follows(grammar, call.replace('"f"', '"g"'))
        )
        assert follows(grammar, wrong.replace('"f"', '"g"')) and not follows(grammar, wrong)
        for text in ("", "plain", " a\nb ", f"half {format.begin[:-1]}"):
            assert follows(grammar, text) == free
        assert follows(grammar, f"First: {call}") == free
        assert not follows(grammar, f"First: {begin} then") and not follows(
            grammar, f"x {format.begin}{{"
        )
        assert not follows(grammar, call.replace('"f"', '"h"'))
        many = (call + "\n") * (most - 1) + call
        assert follows(grammar, many) == (most == 1 or bool(format.end))
        assert follows(grammar, f"{call} and so on") == (free and most > 1 and bool(format.end))
        if format.bare:
            assert follows(grammar, call.removeprefix(begin)) and not follows(grammar, '{"x": 1}')
            assert follows(grammar, 'so {"x": 1}') == free and not follows(grammar, ' {"x": 1}')
        if format.many:
            item = call[len(begin) + 1 : -1]
            assert [
                n for n in range(6) if follows(grammar, f"{begin}[{', '.join([item] * n)}]")
            ] == list(range(1, most + 1))


def test_data_in_a_schema_is_no_reference(follows: Callable[[str, str], bool]) -> None:
    data = {"$ref": "#/x"}
    parameters = {
        "type": "object",
        "properties": {"x": {"const": data}},
        "required": ["x"],
        "additionalProperties": False,
    }
    grammar = lark(FORMATS[2], [Callee("f", parameters)], None, Opening.calls, most=1)
    assert follows(grammar, json.dumps({"name": "f", "parameters": {"x": data}}))


@pytest.mark.parametrize(
    "name", ["default", "const", "enum", "examples", "properties", "$defs", "$ref", "x"]
)
@pytest.mark.parametrize("table", ["$defs", "definitions"])
def test_names_in_a_schema_are_no_words_of_it(
    table: str, name: str, follows: Callable[[str, str], bool]
) -> None:
    """A property called `default` is a property, and a definition called so is one."""
    parameters = {
        "type": "object",
        "properties": {name: {"$ref": f"#/{table}/{name}"}},
        "required": [name],
        "additionalProperties": False,
        table: {name: {"$ref": f"#/{table}/other"}, "other": {"const": "C"}},
    }
    grammar = lark(FORMATS[2], [Callee("f", parameters)], None, Opening.calls, most=1)
    assert follows(grammar, json.dumps({"name": "f", "parameters": {name: "C"}}))
    assert not follows(grammar, json.dumps({"name": "f", "parameters": {name: "D"}}))


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        *itertools.product(
            ({}, {"$id": "http://a.example/s.json"}, {"$id": "urn:a:s"}, {"$id": "s.json"}),
            ("#/$defs/Y", "#y"),
        ),
        *(
            (({"$id": "http://a.example/s.json"}), r)
            for r in ("http://a.example/s.json#/$defs/Y", "s.json#/$defs/Y", "/s.json#y")
        ),
        ({"$id": "http://a.example/s.json#"}, "http://a.example/s.json#/$defs/Y"),
        ({"$id": "urn:a:s"}, "urn:a:s#/$defs/Y"),
        (
            {"$schema": "http://json-schema.org/draft-04/schema#", "id": "http://a.example/s"},
            "#/$defs/Y",
        ),
        ({"$id": "http://a.example/s.json"}, "in.json"),  # what has a name of its own
        ({}, "#/$defs/in"),
    ],
)
def test_references_of_functions_do_not_mix(
    name: Any, reference: str, follows: Callable[[str, str], bool]
) -> None:
    """Each function's schema is a document of its own, also where both are called the same."""

    def schema(word: str) -> Any:
        inner = {"$id": "in.json", "$ref": "#/$defs/Z", "$defs": {"Z": {"enum": [word]}}}
        return {
            **name,
            "type": "object",
            "properties": {"x": {"$ref": reference}},
            "required": ["x"],
            "additionalProperties": False,
            "$defs": {
                "Y": {"$anchor": "y", "enum": [word]},
                **({"in": inner} if "in" in reference else {}),
                "f": {"const": "no"},
            },
        }

    callees = [Callee("f", schema("F")), Callee("g", schema("G"))]
    grammar = lark(FORMATS[2], callees, None, Opening.calls, most=1)
    for called, word in itertools.product((c.name for c in callees), "FG"):
        assert follows(grammar, json.dumps({"name": called, "parameters": {"x": word}})) == (
            word == called.upper()
        )


def test_marks_of_calls_in_arguments_are_text(running: Running) -> None:
    marks = "</tool_call>[TOOL_CALLS]<|python_tag|>"
    parameters = {
        "type": "object",
        "properties": {"x": {"enum": [marks]}},
        "required": ["x"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        found = ask(
            running, tools=[tool], tool_choice=choice, parallel_tool_calls=False, max_tokens=200
        ).json["choices"][0]
        assert json.loads(found["message"]["tool_calls"][0]["function"]["arguments"]) == {
            "x": marks
        }


def test_a_schema_that_refers_to_itself(running: Running) -> None:
    """Its root is the function's, wherever it stands in the grammar."""
    tree = {
        "type": "object",
        "properties": {
            "leaf": {"const": 1},
            "more": {"type": "array", "maxItems": 1, "items": {"$ref": "#"}},
        },
        "required": ["leaf"],
        "additionalProperties": False,
        "definitions": {"x": {"const": 2}},
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": tree}}
    for seed in range(3):
        found = ask(
            running,
            tools=[tool],
            tool_choice="required",
            parallel_tool_calls=False,
            seed=seed,
            max_tokens=400,
        ).json["choices"][0]
        if found["finish_reason"] == "tool_calls":
            assert (
                json.loads(found["message"]["tool_calls"][0]["function"]["arguments"])["leaf"] == 1
            )
