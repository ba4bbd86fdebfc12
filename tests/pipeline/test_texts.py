"""Dialogues as calibration and evaluation text: in the model's own format, wherever a text is read;
and what a plan shows of it."""

from __future__ import annotations

import json
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from quantflow.artifacts.fingerprint import closure
from quantflow.calibration.data import Document, Windows, cut_windows
from quantflow.engine import chat_environment, renderer
from quantflow.engine.text import OFFLINE_DATE, Text
from quantflow.errors import ModelError
from quantflow.pipeline import identities
from quantflow.pipeline.plan import make_plan
from quantflow.pipeline.sensitivity_job import Settings, prepare
from quantflow.pipeline.texts import model_documents
from quantflow.pipeline.windows import recipe_windows
from quantflow.stages import registry
from quantflow.stages.base import PlannedStage
from quantflow.stages.evaluate import Evaluate
from quantflow.stages.registry import load_recipe
from quantflow.tokenizers.load import load_tokenizer
from tests.helpers.runs import STAGES, Bench, invoke, make_bench

TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
SAID = [("human", "What is a river?"), ("gpt", "The small river runs over the hill to a lake.")]
ROLES = {"human": "user", "gpt": "assistant"}
MESSAGES = [{"role": ROLES[who], "content": what} for who, what in SAID]
RENDERED = f"<s>[user] {SAID[0][1]}\n[assistant] {SAID[1][1]}\n"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A model with a chat template, and dialogues in ShareGPT's shape and in OpenAI's."""
    bench = make_bench(tmp_path_factory.mktemp("texts"))
    (bench.model / "chat_template.jinja").write_text(TEMPLATE)
    sharegpt = [
        {
            "id": f"identity_{i}",
            "conversations": [{"from": who, "value": what} for who, what in SAID],
        }
        for i in range(40)
    ]
    (bench.root / "sharegpt.json").write_text(json.dumps(sharegpt))
    lines = [
        json.dumps({"id": f"conversation-{i}", "messages": MESSAGES, "other": f"text {i}"})
        for i in range(40)
    ]
    (bench.root / "chat.JSONL").write_text("\n".join(lines))
    return bench


def expected(bench: Bench, count: int, length: int) -> list[list[int]]:
    """The windows by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    ids = tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=True)["input_ids"]
    # as the template says, and not twice
    assert ids[0] == tokenizer.bos_token_id and ids[1] != ids[0]
    stream = ids * 40
    return [stream[i * length : (i + 1) * length] for i in range(count)]


def evaluating(bench: Bench, **settings: Any) -> list[Any]:
    return [*STAGES, bench.evaluate(**settings)]


def test_every_reader_sees_the_same_tokens(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, sharegpt = (str(bench.root / name) for name in ("chat.JSONL", "sharegpt.json"))
    windows = expected(bench, 6, 32)
    recipe = bench.recipe(
        calibration={"data": sharegpt, "samples": 6, "seqlen": 32},
        stages=evaluating(bench, data=chat),
    )
    plan = make_plan(load_recipe(recipe), device="cpu")
    tokenizer, evaluate = load_tokenizer(bench.model), plan.stage(Evaluate)
    assert plan.recipe.calibration and evaluate
    assert recipe_windows(plan, tokenizer, "calibration").tokens == windows
    assert recipe_windows(plan, tokenizer, "evaluate").tokens == windows[:4]
    job = prepare(
        Settings(str(bench.model), chat, samples=6, length=32, group_size=16, device="cpu")
    )
    assert job.windows.tokens == windows

    taken: list[Windows] = []

    def cut(*arguments: Any, **options: Any) -> Windows:
        taken.append(real(*arguments, **options))
        return taken[-1]

    real = cut_windows
    monkeypatch.setattr("quantflow.pipeline.comparison.cut_windows", cut)
    options = ("--windows", 4, "--length", 32, "--device", "cpu")
    assert (
        invoke("eval", bench.model, "--reference", bench.model, "--data", chat, *options).exit_code
        == 0
    )
    assert taken[0].tokens == windows[:4]
    # Another field, and where a plain text stands in it.
    assert (
        invoke(
            "eval",
            bench.model,
            "--reference",
            bench.model,
            "--data",
            chat,
            "--field",
            "other",
            *options,
        ).exit_code
        == 0
    )
    assert tokenizer.decode(taken[1].tokens[0]).startswith("text 0")
    job = prepare(
        Settings(
            str(bench.model), chat, samples=6, length=32, group_size=16, device="cpu", field="other"
        )
    )
    assert tokenizer.decode(job.windows.tokens[0]).startswith("text 0")


def test_tools_of_a_row_are_given_to_the_template(bench: Bench) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    path = bench.root / "tools.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES, "tools": tools}))
    theirs = AutoTokenizer.from_pretrained(bench.model).apply_chat_template(
        MESSAGES, tools=tools, tokenize=False
    )
    assert list(model_documents(bench.model, str(path))) == [Document(str(theirs), special=False)]


def test_a_plan_shows_how_each_text_begins(bench: Bench) -> None:
    chat, awkward = bench.root / "chat.JSONL", bench.root / "awkward.txt"
    awkward.write_text("never\n<|endoftext|>\x1b[31mred\x07 \u202eleft\u202c [bold]x\n" + "z" * 500)
    recipe = bench.recipe(
        calibration={"data": str(chat), "samples": 2, "seqlen": 32},
        stages=evaluating(bench, data=str(awkward), skip=1),
    )
    found = json.loads(invoke("plan", recipe, "--json").stdout)
    begins = f"\x1b[31mred\x07 \u202eleft\u202c [bold]x\n{'z' * 500}"[:200]
    assert found["samples"] == {"calibration": RENDERED, "evaluate": begins}
    shown = invoke("plan", recipe).stdout
    assert "\x1b" not in shown and "\x07" not in shown and "\u202e" not in shown
    # however its lines were cut
    told = "".join("".join(line.strip("│┃ ") for line in shown.splitlines()).split())
    for part in (
        "[user]Whatisariver?\\n[assistant]Thesmallriver",
        r"\x1b[31mred\x07\u202eleft\u202c[bold]x\nzzz",
    ):
        assert part in told


def test_a_field_that_a_recipe_names(bench: Bench) -> None:
    calibration = {
        "data": str(bench.root / "chat.JSONL"),
        "field": "other",
        "samples": 2,
        "seqlen": 32,
    }
    recipe = bench.recipe(
        calibration=calibration,
        stages=evaluating(bench, data=str(bench.root / "sharegpt.json"), field="conversations"),
    )
    assert json.loads(invoke("plan", recipe, "--json").stdout)["samples"] == {
        "calibration": "text 0",
        "evaluate": RENDERED,
    }
    wrong = invoke(
        "plan", recipe, "--set", "calibration.field=body", "--set", "stages.evaluate.field=id2"
    )
    assert wrong.exit_code == 2
    for part in (
        (
            "the fields id (text), messages (list), other (text); expected text, or a dialogue, in"
            " the field body"
        ),
        "in the field id2",
    ):
        assert part in wrong.stderr


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_a_broken_text_is_said_though_nothing_reads_it(
    bench: Bench, verb: str, tmp_path: Path
) -> None:
    (tmp_path / "ids.jsonl").write_text('{"id": "row-1", "text": null}\n')
    calibration = {"data": str(tmp_path / "ids.jsonl"), "samples": 2, "seqlen": 4096}
    recipe = bench.recipe(calibration=calibration, stages=["rtn", {"pack": {"format": "gptq"}}])
    result = invoke(verb, recipe)
    assert (
        result.exit_code == 2
        and "ids.jsonl:1: an object with the fields id (text), text (null)" in result.stderr
    )
    assert "4096" not in result.stderr  # windows that nobody cuts


def test_a_template_that_refuses_a_row_is_said_by_the_plan(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": MESSAGES}))
    template = bench.model / "chat_template.jinja"
    template.write_text(
        "{% if 'river' in messages[0].content %}{{ raise_exception('roles must alternate') }}{%"
        " endif %}"
    )
    try:
        result = invoke(
            "plan",
            bench.recipe(
                calibration={"data": str(tmp_path / "a.jsonl"), "samples": 2, "seqlen": 32}
            ),
        )
    finally:
        template.write_text(TEMPLATE)
    assert (
        result.exit_code == 2
        and "a.jsonl:1: the model's chat template refused them" in result.stderr
    )
    assert "roles must alternate" in result.stderr


BROKEN = {
    "{% for m in messages %}{{ m.content }}": "TemplateSyntaxError",  # cut off
    "{{ raise_exception('never') }}": "TemplateError: never",
}


@pytest.mark.parametrize("template", BROKEN)
def test_a_template_that_writes_no_dialogue_is_the_models_fault(
    bench: Bench, template: str
) -> None:
    """It is said once, with its file, by whatever reads dialogues; a text needs none."""
    chat, file = str(bench.root / "chat.JSONL"), bench.model / "chat_template.jinja"
    recipe = bench.recipe(
        calibration={"data": chat, "samples": 2, "seqlen": 32}, stages=evaluating(bench, data=chat)
    )
    file.write_text(template)
    try:
        found = [invoke(verb, recipe) for verb in ("plan", "run")]
        found.append(
            invoke(
                "eval",
                bench.model,
                "--reference",
                bench.model,
                "--data",
                chat,
                "--length",
                32,
                "--device",
                "cpu",
            )
        )
        other = list(model_documents(bench.model, chat, field="other"))
        file.unlink()
        config = bench.model / "tokenizer_config.json"
        before = config.read_text()
        config.write_text(json.dumps(json.loads(before) | {"chat_template": template}))
        with pytest.raises(ModelError) as caught:
            list(model_documents(bench.model, chat))
        config.write_text(before)
    finally:
        file.write_text(TEMPLATE)
    for result in found:
        said = " ".join(result.stderr.split())
        assert result.exit_code == 2 and "chat.JSONL" not in said, said
        assert (
            said.count(
                f"{file}: the chat template refuses even a dialogue of one word ({BROKEN[template]}"
            )
            == 1
        ), said
    assert other[0] == Document("text 0")
    assert f"{config} chat_template: the chat template refuses" in str(caught.value)


def test_templates_that_want_more_than_a_question(bench: Bench, tmp_path: Path) -> None:
    """One that must end with an answer writes rows that do."""
    template = bench.model / "chat_template.jinja"
    template.write_text(
        "{% if messages[-1].role != 'assistant' %}{{ raise_exception('no answer') }}{% endif %}"
        + TEMPLATE
    )
    try:
        assert next(model_documents(bench.model, str(bench.root / "chat.JSONL"))) == Document(
            RENDERED, special=False
        )
    finally:
        template.write_text(TEMPLATE)


def test_rows_that_a_template_refuses_are_left_out_and_said(bench: Bench, tmp_path: Path) -> None:
    """By the plan, by the run on stderr, in the report, by `eval`."""
    odd = [{"role": "user", "content": "Refuse me."}, *MESSAGES]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"messages": odd if i == 2 else MESSAGES}) + "\n" for i in range(40))
    )
    template = bench.model / "chat_template.jinja"
    template.write_text(
        "{% if messages[0].content == 'Refuse me.' %}{{ raise_exception('not that') }}{% endif %}"
        + TEMPLATE
    )
    chat = str(tmp_path / "a.jsonl")
    recipe = bench.recipe(
        calibration={"data": chat, "samples": 4, "seqlen": 32}, stages=[*STAGES, bench.evaluate()]
    )
    options = ("--windows", 4, "--length", 32, "--device", "cpu")
    try:
        planned = json.loads(invoke("plan", recipe, "--json").stdout)["notes"]
        run = invoke("run", recipe)
        evaluated = invoke(
            "eval", bench.model, "--reference", bench.model, "--data", chat, *options
        )
    finally:
        template.write_text(TEMPLATE)
    assert run.exit_code == 0 and evaluated.exit_code == 0, run.stderr + evaluated.stderr
    refusal = (
        "left out; the first: a.jsonl:3: the model's chat template refused them: TemplateError: not"
        " that"
    )
    (planned,) = [note for note in planned if note.startswith("calibration: ")]
    report = json.loads((bench.output / "report.json").read_text())
    (reported,) = [note for note in report["notes"] if note.startswith("calibration: ")]
    assert refusal in planned and refusal in reported and str(tmp_path) not in json.dumps(report)
    assert report["calibration"]["left_out"]["count"] == 1
    said = " ".join(run.stderr.split())
    assert "note: calibration: 1 of the first" in said and refusal in said
    assert "note: text: 1 of the first" in evaluated.stderr


def test_tokens_do_not_depend_on_the_date(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 3.1's template writes the day into every dialogue. A server's says today."""
    template = bench.model / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}")
    # In this process, whose clock is the test's.
    monkeypatch.setattr(renderer, "_ask", lambda child, line: renderer.answer(line))
    found: list[tuple[Any, str]] = []
    try:
        for day in (date(2026, 3, 1), date(2031, 12, 24)):
            clock = type(
                "Clock",
                (datetime,),
                {"now": classmethod(lambda cls, day=day: datetime.combine(day, time()))},
            )
            monkeypatch.setattr(chat_environment, "datetime", clock)
            windows = cut_windows(
                load_tokenizer(bench.model),
                model_documents(bench.model, str(bench.root / "chat.JSONL")),
                count=3,
                length=16,
            )
            found.append((windows, Text(bench.model).render(MESSAGES)))
    finally:
        template.write_text(TEMPLATE)
    assert found[0][0] == found[1][0]
    assert [said.split(" What")[0] for _, said in found] == ["01 Mar 2026", "24 Dec 2031"]
    assert datetime(2024, 7, 26) == OFFLINE_DATE  # docs/recipe.md


def test_what_reads_texts_throws_no_stored_layer_away() -> None:
    """The keys of layers have the code that computes them and reads their weights, and none that
    makes tokens of texts."""
    kinds = registry.STAGES
    stages = [kind for kind in kinds.values() if issubclass(kind, PlannedStage) and kind.layer]
    for stage in stages:
        code = closure(*stage.modules(), *identities.READS, *identities.NATIVE)
        assert {
            "quantflow.quant.product",
            "quantflow.decoder.native",
            "quantflow.models.registry",
        } <= set(code)
        assert not [name for name in code if "tokenizer" in name or "vocabulary" in name]
        assert {name for name in code if name.startswith("quantflow.calibration.")} <= {
            "quantflow.calibration.statistics"
        }
    assert {
        "quantflow.quant.gptq",
        "quantflow.quant.numbers.nf4",
        "quantflow_kernels.cpu_solver",
    } <= set(closure(*kinds["gptq"].modules()))
    assert "quantflow.quant.grid" not in closure(*kinds["calibrate"].modules())
