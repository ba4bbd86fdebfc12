"""Chat templates beside transformers: the same text, whatever a template uses of its environment,
and the same template of several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from quantflow.engine.text import Text
from quantflow.errors import ModelError, RequestError
from quantflow.tokenizers.chat_templates import chat_template
from quantflow.tokenizers.export import export_tokenizer
from quantflow.tokenizers.load import tokenizer_files

PARAMETERS = {
    "type": "object",
    "required": ["city"],
    "properties": {
        "city": {"type": "string", "description": "The <b>city</b>, e.g. Zürich"},
        "days": {"type": ["integer", "null"]},
        "units": {"type": "array", "items": {"type": "string"}},
    },
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'It\'s the "weather"',
            "parameters": PARAMETERS,
        },
    },
    {
        "type": "function",
        "function": {
            "name": "time",
            "description": "",
            "parameters": {"type": "object", "properties": {}},
        },
    },
]
CALL = {
    "type": "function",
    "id": "abc123def",
    "function": {"name": "weather", "arguments": {"city": "Zürich & Bern", "days": 2}},
}
USER = {"role": "user", "content": "  Hi <there> & 你好\n"}
BOT = {"role": "assistant", "content": "Yes?"}
TALKS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "answered": [USER, BOT],
    "with a system text": [
        {"role": "system", "content": "Be brief."},
        USER,
        BOT,
        {"role": "user", "content": "Why"},
    ],
    "a call": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "tool_call_id": "abc123def", "content": "rain"},
        BOT,
    ],
    "reasoning": [USER, {"role": "assistant", "content": "4", "reasoning": "2 + 2"}, USER],
    "two users": [USER, USER],
}

# Written here, in the manner of the families named.
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26" %}{% endif %}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system_message = "" %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{ "Environment: ipython\\n" }}{% endif %}
{{- "Today: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- if tools is not none %}
    {%- for t in tools %}{{ t | tojson(indent=4) }}{{ "\\n\\n" }}{% endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{ raise_exception("one call at once") }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{ "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{ message.content | tojson }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}{{- messages[0].content if messages[0].role == 'system' else 'You are a helpful assistant.' }}
    {{- "\\n\\n# Tools\\n<tools>" }}{%- for tool in tools %}{{ "\\n" }}{{ tool | tojson }}{% endfor %}{{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" %}
        {%- set ns.multi_step_tool = false %}{% set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}{% set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in (message.content or '') %}
            {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n<think>' + reasoning_content.strip('\\n') + '</think>' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}{{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
HERMES = """{%- macro kind(spec) %}
    {%- set names = {"string": "str", "integer": "int", "null": "None"} %}
    {%- if spec.type == "array" %}{{ "list[" + kind(spec["items"]) + "]" }}
    {%- elif spec.type is iterable and spec.type is not string %}
        {{- "Union[" }}{% for t in spec.type %}{{ kind({"type": t}) }}{% if not loop.last %}{{ "," }}{% endif %}{% endfor %}{{ "]" }}
    {%- else %}{{ names.get(spec.type, "Any") }}{% endif %}
{%- endmacro %}
{{- bos_token + "<|im_start|>system\\nYou call functions.\\n<tools>" }}
{%- for tool in tools or [] %}
    {%- if tool.function is defined %}{% set tool = tool.function %}{% endif %}
    {{- '{"name": "' + tool.name + '", "description": "' + tool.name + '(' }}
    {%- for name, spec in tool.parameters.properties | items %}
        {{- name + ": " + kind(spec) }}{% if not loop.last %}{{ ", " }}{% endif %}
    {%- endfor %}{{ ')", "parameters": ' + tool.parameters | tojson(sort_keys=True) + '}' }}
{%- endfor %}
{{- "</tools><|im_end|>\\n" }}
{%- for message in messages if message.role != "system" %}
    {%- if message.role == "assistant" and message.tool_calls is defined %}
        {{- "<|im_start|>assistant" }}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{% set call = call.function %}{% endif %}
            {{- '\\n<tool_call>\\n' + dict(name=call.name, arguments=call.arguments) | tojson + '\\n</tool_call>' }}
        {%- endfor %}{{ "<|im_end|>\\n" }}
    {%- else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}{% set system = messages[0]["content"] %}{% set rest = messages[1:] %}
{%- else %}{% set rest = messages %}{% endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- set users = rest | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}{% set ns.index = 0 %}
{%- for message in rest %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}{{ raise_exception("roles must alternate") }}{% endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in rest %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == users[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}{{ '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{ '"' + key + '": "' + val + '"' }}{% else %}{{ '"' + key + '": ' + val | tojson }}{% endif %}
                    {%- if not loop.last %}{{ ", " }}{% endif %}
                {%- endfor %}{{ "}}" }}{% if not loop.last %}{{ ", " }}{% else %}{{ "]" }}{% endif %}
            {%- endfor %}{{ "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system is defined %}{{ "[INST] " + system + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{ "[INST] " + message["content"] + "[/INST]" }}{% endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in message.tool_calls %}
            {%- if not call.id is defined or call.id | length != 9 %}{{ raise_exception("ids have 9 letters") }}{% endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}{{ "]" + eos_token if loop.last else ", " }}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{ " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" %}{{ '[TOOL_RESULTS] {"content": ' + message.content | string + '}[/TOOL_RESULTS]' }}
    {%- else %}{{ raise_exception("no such role: " + message.role) }}{% endif %}
{%- endfor %}"""
TEMPLATES = {
    "Llama 3.1": LLAMA3,
    "Qwen": QWEN,
    "Hermes": HERMES,
    "Mistral": MISTRAL,
    "blocks trimmed": (
        "{% for m in messages %}\n    {% if m.role == 'user' %}\n  U: {{ m.role }}\n    {% endif"
        " %}\n{% endfor %}\nend\n\n"
    ),
    "year": "{{ strftime_now('%Y') }} {{ strftime_now is defined }}",
    "generation": (
        "{% for m in messages %}{%- generation -%} {{ m.content or '-' }}{% set x = 1 %} {%-"
        " endgeneration %}{{ x }}{% endfor %}"
    ),
    "a namespace": (
        "{% set n = namespace(n=0) %}{% for m in 'ab' %}{% generation %}{% set n.n = loop.index"
        " %}{% endgeneration %}{% endfor %}{{ n.n }}"
    ),
    "tojson": "{{ tools | tojson }}|{{ messages | tojson(indent=2) }}",
    "tojson, all of it": (
        "{{ tools | tojson(ensure_ascii=True, indent=None, separators=(',', ':'), sort_keys=True)"
        " }}{{ 'é<&>' | tojson }}"
    ),
    "tojson by place": "{{ messages | tojson(False, 1) }}",
    "given or not": (
        "{{ tools is none }} {{ documents is none }} {{ tools is defined }} {{"
        " add_generation_prompt }} {{ xyz is defined }}"
    ),
    "loop controls": (
        "{% for m in messages %}{% if loop.first %}{% continue %}{% elif loop.last %}{% break %}{%"
        " endif %}!{% endfor %}"
    ),
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ cls_token is defined }}{{ mask_token }}",
    "keys that are null": (
        "{% for m in messages %}{{ 'content' in m }}{{ m.content is defined }}{{"
        " m.get('tool_calls') }}{% endfor %}"
    ),
    "dict and namespace": (
        "{{ dict(a=1, **{'b': 2}) }}{{ dict.fromkeys(['a'], 3) }}{% set n = namespace(self=1) %}{{"
        " n.self }}"
    ),
    "a namespace's hidden names": "{% set n = namespace(_x=1) %}",
    "the class of things": "{{ messages.__class__ }}{{ namespace.__init__ }}",
    "a list changed": "{{ messages.append(1) }}",
    "reasoning": (
        "{% for m in messages %}[{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.reasoning }}]{%"
        " endfor %}"
    ),
    "call blocks": (
        "{% macro box() %}[{{ caller() }}]{% endmacro %}{% call box() %}{{ messages[0].content }}{%"
        " endcall %}"
    ),
    "filters": (
        "{{ messages | map(attribute='role') | unique | join(',') }}{{ messages[0].content | e }}{{"
        " messages[-1].role | upper }}"
    ),
    "refused": "{{ raise_exception('not with ' ~ messages[0].role) }}",
    "not whole": "{% generation %}",
    "an end of nothing": "{% endgeneration %}",
}


def files(tiny: Path, folder: Path, config: dict[str, Any] | None = None, **more: str) -> Path:
    """The tiny model's tokenizer with a chat template, and whatever else."""
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "config.json"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    said = json.loads((tiny / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**said, **(config or {})}))
    for name, text in more.items():
        path = folder / name.replace("__", "/").replace("_jinja", ".jinja").replace(
            "_json", ".json"
        )
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_rendered_as_transformers_does(tiny: Path, tmp_path: Path, name: str) -> None:
    folder = files(tiny, tmp_path / "model", chat_template_jinja=TEMPLATES[name])
    ours, theirs = Text(folder), AutoTokenizer.from_pretrained(folder)
    outcomes = set()
    for talk in TALKS.values():
        for tools in (None, TOOLS, []):
            for answer in (True, False):
                try:
                    expected = theirs.apply_chat_template(
                        talk, tools=tools, add_generation_prompt=answer, tokenize=False
                    )
                except Exception:  # of a template's many kinds
                    with pytest.raises(RequestError, match="chat template refused"):
                        ours.render(talk, tools=tools, add_generation_prompt=answer)
                    outcomes.add("refused")
                else:
                    assert ours.render(talk, tools=tools, add_generation_prompt=answer) == expected
                    outcomes.add("rendered")
    if name in (
        "refused",
        "not whole",
        "an end of nothing",
        "a namespace's hidden names",
        "a list changed",
    ):
        assert outcomes == {"refused"}
    else:
        assert "rendered" in outcomes


DEFAULT, TOOL_USE = "default {{ messages[0].content }}", "tools {{ tools | length }}"
LIST = [
    {"name": "default", "template": DEFAULT},
    {"name": "tool_use", "template": TOOL_USE},
    {"name": "rag", "template": "rag"},
]
PLACES: dict[str, dict[str, Any]] = {
    "one": {"config": {"chat_template": DEFAULT}},
    "a list": {"config": {"chat_template": LIST}},
    "a list without tool_use": {"config": {"chat_template": LIST[:1]}},
    "a folder": {
        "chat_template_jinja": DEFAULT,
        "additional_chat_templates__tool_use_jinja": TOOL_USE,
    },
    "files before the list": {
        "config": {"chat_template": LIST},
        "chat_template_jinja": "file {{ tools }}",
    },
    "the folder before the list": {
        "config": {"chat_template": LIST},
        "chat_template_jinja": "file",
        "additional_chat_templates__tool_use_jinja": "folder",
        "additional_chat_templates__rag_jinja": "x",
    },
}


@pytest.mark.parametrize("place", PLACES)
def test_the_template_of_several_that_transformers_takes(
    tiny: Path, tmp_path: Path, place: str
) -> None:
    folder = files(tiny, tmp_path / "model", **PLACES[place])
    exported = tmp_path / "exported"
    export_tokenizer(folder, exported)
    (exported / "config.json").write_bytes((folder / "config.json").read_bytes())
    theirs, again = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(exported)
    for tools in (None, TOOLS):
        expected = theirs.apply_chat_template([USER], tools=tools, tokenize=False)
        assert again.apply_chat_template([USER], tools=tools, tokenize=False) == expected
        for path in (folder, exported):
            assert Text(path).render([USER], tools=tools, add_generation_prompt=False) == expected
    # Nothing of the source is lost on the way.
    ours = chat_template(folder)
    assert ours is not None and chat_template(exported) == ours
    assert ours.templates == (
        theirs.chat_template
        if isinstance(theirs.chat_template, dict)
        else {"default": theirs.chat_template}
    )


def test_a_folder_alone_adds_to_the_default_one(tiny: Path, tmp_path: Path) -> None:
    """Which transformers cannot do: it would have no default one left."""
    more = {"additional_chat_templates__tool_use_jinja": TOOL_USE}
    folder = files(tiny, tmp_path / "model", {"chat_template": DEFAULT}, **more)
    assert Text(folder).render([USER], tools=TOOLS) == "tools 2" and Text(folder).render(
        [USER]
    ).startswith("default")
    # an artifact's identity has it
    assert "additional_chat_templates/tool_use.jinja" in tokenizer_files(folder)


def test_several_templates_and_none_for_this(tiny: Path, tmp_path: Path) -> None:
    text = Text(files(tiny, tmp_path / "model", {"chat_template": LIST[1:]}))
    assert text.render([USER], tools=TOOLS) == "tools 2"
    with pytest.raises(RequestError, match="called rag, tool_use; expected one called default"):
        text.render([USER])


@pytest.mark.parametrize(
    "wrong", [[{"name": "default"}], ["x"], 7, {"default": 1}, [{"name": 1, "template": "x"}]]
)
def test_a_template_of_another_shape_is_refused(tiny: Path, tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(ModelError, match="chat_template"):
        chat_template(files(tiny, tmp_path / "model", {"chat_template": wrong}))
