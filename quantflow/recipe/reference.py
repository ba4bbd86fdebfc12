"""The reference of recipes as a page of Markdown, made from the schema: `quantflow schema
--markdown`, docs/recipe.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from quantflow.recipe.schema import json_schema
from quantflow.recipe.stage import Stages

Json = dict[str, Any]

# Under the heading of each section that is no stage: what stands at the top level of a recipe.
EXAMPLES = {
    "Recipe": "name: mine\nmodel: ./my-model\nseed: 0\nstages:\n  - rtn\n  - pack: {format: gptq}",
    "calibration": "calibration: {data: c4, file: ./c4.jsonl, samples: 128, seqlen: 2048}",
    "weights": (
        'weights:\n  bits: 4\n  group_size: 128\n  ignore: [lm_head, "*.layers.0.*"]\n'
        '  overrides:\n    - {match: "*.down_proj", bits: 8}'
    ),
    "weights.overrides": (
        'weights: {overrides: [{match: "*.down_proj", group_size: 64}, {match: "*.[qkv]_proj",'
        " ignore: true}]}"
    ),
}
_INTRODUCTION = """\
<!-- Made by `quantflow schema --markdown`: change quantflow/recipe/ and quantflow/stages/, not this page. -->
# Recipes

A recipe is one YAML file. Every key is listed here with its type, its range and its default; a key that is not listed is an error, and all
errors of a recipe are shown at once, each with its line. `--set dotted.path=value` changes one value for one run
(`--set weights.bits=8`, `--set stages.gptq.damp=0.05`, `--set stages.5.format=awq` for the sixth stage). Numbers are YAML 1.2's: `1e-2` is
one hundredth, `010` is ten. An editor with a YAML language server checks recipes against what `quantflow schema` prints.

A relative path is looked for in the current directory, in the recipe's, and in the one above that.
"""
_DATA = """\
What a file is, its name says, in any case: `.txt`, `.text`, `.md`, `.raw`, `.tokens` or no ending (a text, with `<|endoftext|>` between
documents); `.jsonl`, `.ndjson` (a value a line); `.json` (a list, or lines); `.csv`, `.tsv` (names in the first line); each also packed
(`.gz`, `.zst`, `.bz2`, `.xz`); `.parquet`, `.arrow`. Any other is refused.

A row is a text, or an object with the first of these that it has:

| fields | what is taken |
|---|---|
| `text` | that text |
| `messages`, `conversations`, `conversation` | a dialogue: `role` and `content` (a text, or parts of type `text`), or `from` and `value` |
| `prompt`, `instruction`, `question`, `query` or `input`; `response`, `answer`, `completion`, `output` or `chosen` | a dialogue of two |
| `chosen` alone | that dialogue or text |
| `content`, `sentence`, `document` | that text |
| `prompt` alone | that text, where no other field is a text |

Names may be in any case, and a list of messages may be JSON in a text. A question and an answer may each be a text, a message or a list of
messages; an answer beside a dialogue that ends with a question (`chosen`, say) is its last turn.

What a question is about stands behind it: `question` or `query` (of an `instruction`), `input`, `context`, `passage`, `content`,
`document`, `sentence`. The turns of `history` stand before it. `system`, `system_prompt` or `system_message` comes first in any dialogue
that has no system message. `field` takes the text, or the dialogue, from another field. A dialogue is written by the model's own chat
template, with `tools` where the row has some; without a template, it is what was said, a line break between. For a template, today is
26 July 2024, so that the same text gives the same tokens tomorrow (`chat` and `serve` have the real date).

A blank text is passed over, and so is one that is null; where no row has another, that is an error, and so is a row without any of these
fields: it names those that are there. A dialogue with a role that is not known, a part that is no text, or turns that the template refuses
is left out, and the report says how many were and why the first; more than half of the rows are an error.
"""
_STAGES = """\
## Stages
`stages` is a list, in this order: {names}.
An entry is a name, or one name with its settings. A recipe has one of gptq, rtn and nf4, and at least one pack, one for each format.
A recipe without `weights` that has `calibrate` may leave the rounding out, and then changes no weight; with `calibrate` and `kv_qparams`
alone it needs no pack either (`recipes/calibrate.yaml`, `recipes/kv_qparams.yaml`).
"""


def markdown(kinds: Stages) -> str:
    """The whole page, of these stages. Raises KeyError for a section that has no example."""
    schema = json_schema(kinds)
    examples = EXAMPLES | examples_of(kinds)
    definitions = schema["$defs"]
    parts = [_INTRODUCTION, *_section("Recipe", schema, definitions, examples, level=2)]
    for key, value in schema["properties"].items():
        if inner := _definition(value, definitions):
            parts += _sections(key, inner, definitions, examples, level=2)
        if key == "calibration":
            parts.append(_DATA)
    parts.append(_STAGES.format(names=", ".join(kinds)))
    for name, kind in kinds.items():
        parts += _sections(
            name,
            definitions[kind.__name__],
            definitions,
            examples,
            level=3,
            page=f"stages/{name}.md",
        )
    return "\n".join(parts).rstrip("\n")


def examples_of(kinds: Stages) -> dict[str, str]:
    """Each stage's, and those of the sections that its settings hold: `evaluate.gates`."""
    return {
        name: text
        for stage in kinds.values()
        for name, text in (
            (stage.name, stage.example),
            *((f"{stage.name}.{key}", text) for key, text in stage.examples.items()),
        )
    }


def _definition(value: Json, definitions: Json) -> Json | None:
    """The section that a key holds, or holds a list of; None for a plain value."""
    places = [value, value.get("items", {}), *value.get("anyOf", [])]
    name = next((place["$ref"].rpartition("/")[2] for place in places if "$ref" in place), None)
    return definitions[name] if name else None


def _sections(
    title: str, schema: Json, definitions: Json, examples: Json, *, level: int, page: str = ""
) -> Iterator[str]:
    """A section, and those that its keys hold."""
    yield from _section(title, schema, definitions, examples, level=level, page=page)
    for key, value in schema.get("properties", {}).items():
        if inner := _definition(value, definitions):
            yield from _sections(f"{title}.{key}", inner, definitions, examples, level=level)


def _section(
    title: str, schema: Json, definitions: Json, examples: Json, *, level: int, page: str = ""
) -> Iterator[str]:
    yield f"{'#' * level} {'A recipe' if title == 'Recipe' else f'`{title}`'}"
    more = f" [More]({page})." if page else ""
    yield " ".join(schema["description"].split()) + more + "\n"
    if schema.get("properties"):
        yield "| key | value | default | |\n|---|---|---|---|"
        required = schema.get("required", [])
        for key, value in schema["properties"].items():
            meant = value.get("description") or (_definition(value, definitions) or {}).get(
                "description", ""
            )
            description = meant.replace("|", "\\|").replace("<", "&lt;")
            yield (
                f"| `{key}` | {_values(value)} |"
                f" {'required' if key in required else _default(value)} | {description} |"
            )
        yield ""
    yield f"```yaml\n{examples[title]}\n```\n"


def _default(value: Json) -> str:
    default = value.get("default")
    if default is None or isinstance(default, dict) or default == []:
        return "–"
    shown = (
        {True: "true", False: "false"}.get(default, default)
        if isinstance(default, bool)
        else default
    )
    return f"`[{', '.join(shown)}]`" if isinstance(shown, list) else f"`{shown}`"


def _values(value: Json) -> str:
    """What a key takes, in words."""
    if "$ref" in value:
        return "a mapping"
    if "anyOf" in value:
        choices = [_values(choice) for choice in value["anyOf"] if choice.get("type") != "null"]
        return " or ".join(dict.fromkeys(choices))
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(
            f"`{str(choice).lower() if isinstance(choice, bool) else choice}`"
            for choice in value["enum"]
        )
    if value.get("type") == "array":
        return (
            "a list of mappings"
            if "$ref" in value["items"] or "anyOf" in value["items"]
            else "a list of texts"
        )
    kind = {
        "integer": "an integer",
        "number": "a number",
        "string": "a text",
        "boolean": "`true`, `false`",
    }[value["type"]]
    bounds = (
        ("minimum", "at least"),
        ("exclusiveMinimum", "more than"),
        ("maximum", "at most"),
        ("exclusiveMaximum", "less than"),
    )
    bounds_text = [f"{words} {_number(value[bound])}" for bound, words in bounds if bound in value]
    return ", ".join([kind, *bounds_text])


def _number(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:g}" if value < 1e6 else str(value)
