"""Tasks from files: every form and every fault, the three ways to be right, and answers against
transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantflow.engine.config import EngineConfig
from quantflow.engine.engine import Engine
from quantflow.engine.llm import LLM
from quantflow.engine.request import SamplingParams
from quantflow.errors import DataError
from quantflow.evaluate.tasks import (
    CHOICE,
    EXACT,
    WINOGRAD,
    Result,
    Settings,
    Task,
    answer,
    compare,
    normalized,
    read_tasks,
)
from tests.helpers.tiny import SENTENCES

SHARED = Path(__file__).resolve().parents[3] / "shared"


def write(path: Path, *lines: Any) -> Path:
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines),
        encoding="utf-8",
    )
    return path


def read(path: Path, **settings: Any) -> Task:
    return read_tasks([path], [Settings(**settings)])[0]


def run(folder: Path, task: Task, batch: int = 8, **options: Any) -> Result:
    return answer(
        Engine(
            folder,
            EngineConfig(**{"device": "cpu", "block_size": 16, "max_batch_size": 8, **options}),
        ),
        task,
        batch,
    )


# Likeliest are: a word that is one token; per letter, words that are one token each; per byte, a
# letter of three bytes.
OPTIONS = (
    ["fox", "jumps over the river number", "Käfer über dem Haus", "cat"],
    ["q", "€", "x q", "€ x €"],
)
CHOICES: list[dict[str, Any]] = [
    {"query": f"{SENTENCES[9 * i]} The", "choices": OPTIONS[i % 2], "gold": i // 2 % 4}
    for i in range(16)
]
SCHEMAS = [
    {
        "context_options": [SENTENCES[5 * i], SENTENCES[5 * i + 40]],
        "continuation": "It looks at the hill.",
        "gold": i % 2,
    }
    for i in range(8)
]


def test_the_three_forms(tmp_path: Path) -> None:
    choice = write(
        tmp_path / "a.jsonl",
        {"query": " Q? \n", "choices": ["x", " y"], "gold": 1, "category": "further keys"},
        "",
        CHOICES[0],
    )
    schema = write(
        tmp_path / "b.jsonl",
        {"context_options": ["one", "two", "three"], "continuation": "is", "gold": [0, 2]},
    )
    exact = write(
        tmp_path / "c.jsonl",
        {"query": "2 + 2 =", "answer": "4"},
        {"query": "A river?", "answers": ["Rhine", "the Rhine"]},
    )
    exact.write_bytes(b"\xef\xbb\xbf" + exact.read_bytes())  # as Windows writes it
    found = read_tasks([choice, schema, exact], [Settings()] * 3)
    assert [(task.name, task.form, len(task.items)) for task in found] == [
        ("a", CHOICE, 2),
        ("b", WINOGRAD, 1),
        ("c", EXACT, 2),
    ]
    assert found[0].items[0].choices == (("Q?", "x"), ("Q?", "y")) and found[0].items[0].gold == (
        1,
    )
    assert [item.line for item in found[0].items] == [1, 3]
    assert found[1].items[0].choices == (("one", "is"), ("two", "is"), ("three", "is"))
    assert found[2].items[1].answers == ("Rhine", "the Rhine")
    assert [task.chance for task in found] == [
        pytest.approx((1 / 2 + 1 / 4) / 2),
        pytest.approx(2 / 3),
        None,
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "JSON of type list"),
        ("{}", "an empty object"),
        ("[" * 100_000, "not JSON"),
        ({"query": "q", "gold": 0}, "an object with 'gold', 'query'"),
        (
            {"query": "q", "answer": "a", "answers": ["a"]},
            "an object with 'answer', 'answers', 'query'",
        ),
        (
            {"query": "q", "choices": "ab", "gold": 0},
            'choices: "ab"; expected a list of at least 2 texts',
        ),
        ({"query": "q", "choices": ["a"], "gold": 0}, "a list of at least 2"),
        (
            {"query": "q", "choices": ["a", " "], "gold": 0},
            'choices[1]: " "; expected text that is not empty',
        ),
        ({"query": "q", "choices": ["a", 3], "gold": 0}, "choices[1]: 3; expected text"),
        ({"query": "", "choices": ["a", "b"], "gold": 0}, 'query: ""'),
        ({"query": None, "choices": ["a", "b"], "gold": 0}, "query: null; expected text"),
        (
            {"query": "q", "choices": ["a", "b"], "gold": 2},
            "gold: 2; expected an index from 0 to 1",
        ),
        ({"query": "q", "choices": ["a", "b"], "gold": -1}, "gold: -1"),
        ({"query": "q", "choices": ["a", "b"], "gold": True}, "gold: true"),
        ({"query": "q", "choices": ["a", "b"], "gold": "0"}, 'gold: "0"; expected an index'),
        ({"query": "q", "choices": "['x']", "gold": 0}, "choices: \"['x']\"; expected a list"),
        ({"query": 5, "answer": "a"}, "query: 5; expected text"),
        ({"query": ["\ud800ü"], "answer": "a"}, 'query: ["\\ud800ü"]; expected text'),
        ({"query": "q", "answer": None}, "answer: null; expected text"),
        ({"query": "q", "answer": ["a" * 99]}, 'answer: ["' + "a" * 57 + "…; expected text"),
        ({"query": "q", "choices": ["a", "b"], "gold": []}, "gold: []"),
        ({"query": "q", "choices": ["a", "b"], "gold": [0, 0]}, "gold: [0, 0]"),
        ({"query": "q", "choices": ["a", "b"], "gold": [0, 2]}, "gold: [0, 2]"),
        ({"query": "\ud800", "choices": ["a", "b"], "gold": 0}, "half a surrogate pair"),
        (
            {"context_options": ["a", "b"], "continuation": ["c"], "gold": 0},
            'continuation: ["c"]; expected text',
        ),
        ({"query": "q", "answers": []}, "a list of at least 1"),
        (
            {"query": "q", "answer": "a"},
            "a question of exact match; expected multiple choice, as line 1 is",
        ),
    ],
)
def test_what_is_wrong_with_a_line_is_said_with_its_place(
    tmp_path: Path, line: Any, said: str
) -> None:
    path = write(tmp_path / "bad.jsonl", CHOICES[0], line, CHOICES[1])
    with pytest.raises(DataError) as caught:
        read(path)
    [problem] = caught.value.problems
    assert problem.where == f"{path}:2" and said in str(problem)


def test_every_fault_of_every_file_at_once(tmp_path: Path) -> None:
    many = write(tmp_path / "many.jsonl", *["{"] * 50)
    two = write(
        tmp_path / "two.jsonl",
        CHOICES[0],
        "{}",
        CHOICES[1],
        {"query": "q", "choices": ["a", "b"], "gold": 7},
    )
    empty, latin = write(tmp_path / "empty.jsonl"), tmp_path / "latin.jsonl"
    latin.write_bytes('{"query": "ü"}'.encode("latin-1"))
    few = write(tmp_path / "few.jsonl", CHOICES[0], CHOICES[1])
    (tmp_path / "sub").mkdir()
    twin = write(tmp_path / "sub" / "few.jsonl", CHOICES[0])
    good = write(tmp_path / "good.jsonl", CHOICES[0])
    with pytest.raises(DataError) as caught:
        files = [many, two, empty, latin, good, tmp_path / "nowhere.jsonl", tmp_path]
        read_tasks(files, [Settings()] * len(files))
    said = [str(problem) for problem in caught.value.problems]
    assert len(said) == 21 + 2 + 4 and f"{many}: 30 more problems like these" in said
    assert [problem.where for problem in caught.value.problems[21:23]] == [f"{two}:2", f"{two}:4"]
    assert [
        part in text
        for part, text in zip(
            ("an empty file", "not UTF-8", "No such file", "directory"), said[23:], strict=True
        )
    ] == [True] * 4
    with pytest.raises(
        DataError, match="2 questions; expected more than the 2 that are shown as examples"
    ):
        read(few, few_shot=2)
    with pytest.raises(DataError, match="a second task called few"):
        read_tasks([few, twin], [Settings()] * 2)


def scores_by_transformers(
    folder: Path, questions: list[list[tuple[str, str]]]
) -> list[list[float]]:
    """Log-probabilities of (context, continuation) in float32, one at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )

    def score(context: str, continuation: str) -> float:
        whole, start = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
        with torch.no_grad():
            logprobs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        return sum(float(logprobs[i - 1, whole[i]]) for i in range(start, len(whole)))

    return [[score(*pair) for pair in question] for question in questions]


def test_multiple_choice_is_transformers(tiny: Path, tmp_path: Path) -> None:
    task = read(write(tmp_path / "choices.jsonl", *CHOICES), delimiter="\nAnswer: ")
    found = run(tiny, task, dtype="float32")
    expected = scores_by_transformers(
        tiny,
        [
            [(f"{row['query']}\nAnswer:", f" {choice}") for choice in row["choices"]]
            for row in CHOICES
        ],
    )
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for row, own, logprobs in zip(CHOICES, found.answers, expected, strict=True):
        assert own.logprobs == pytest.approx(logprobs, abs=2e-4)
        for name, lengths in (
            ("acc", [1] * 4),
            ("acc_norm", [len(c) for c in row["choices"]]),
            ("acc_bytes", [len(c.encode()) for c in row["choices"]]),
        ):
            rated = torch.tensor(logprobs) / torch.tensor(lengths)
            right[name].append(int(rated.argmax()) == row["gold"])
    for name, wanted in right.items():
        assert found.right(name) == wanted
        assert found.accuracy(name)[0] == sum(wanted) / 16
    # The three ways to be right differ on these questions, or nothing was tested.
    assert right["acc"] != right["acc_norm"] != right["acc_bytes"] and all(map(any, right.values()))


def test_winograd_compares_contexts(tiny: Path, tmp_path: Path) -> None:
    found = run(tiny, read(write(tmp_path / "schemas.jsonl", *SCHEMAS)), dtype="float32")
    expected = scores_by_transformers(
        tiny,
        [
            [(context, f" {row['continuation']}") for context in row["context_options"]]
            for row in SCHEMAS
        ],
    )
    assert [a.logprobs for a in found.answers] == [
        pytest.approx(logprobs, abs=2e-4) for logprobs in expected
    ]
    wanted = [
        max(range(2), key=logprobs.__getitem__) == row["gold"]
        for row, logprobs in zip(SCHEMAS, expected, strict=True)
    ]
    assert (
        found.right("acc") == found.right("acc_norm") == found.right("acc_bytes") == wanted
        and len(set(wanted)) == 2
    )


def test_several_right_choices(tiny: Path, tmp_path: Path) -> None:
    rows = [{**row, "gold": gold} for row in CHOICES[:4] for gold in ([0, 1, 2, 3], [1, 3])]
    found = run(tiny, read(write(tmp_path / "many.jsonl", *rows)))
    assert all(found.right("acc")[::2])
    single = [
        run(
            tiny, read(write(tmp_path / "one.jsonl", *({**row, "gold": g} for row in CHOICES[:4])))
        ).right("acc")
        for g in (1, 3)
    ]
    assert found.right("acc")[1::2] == [a or b for a, b in zip(*single, strict=True)]


def test_exact_match(tiny: Path, tmp_path: Path) -> None:
    llm = LLM(tiny, device="cpu", block_size=16)
    params = SamplingParams(max_tokens=9, stop=("\n",))
    queries = [SENTENCES[i][:-1] for i in range(6)]
    said = [llm.generate(f"{query}\nA:", params)[0].text.strip() for query in queries]
    assert all(said)
    answers = [
        said[0],
        f"{said[1]} ",
        f"The, {said[2]}!",
        said[3] + "x",
        "nothing like it",
        ["no", said[5]],
    ]
    rows = [
        {"query": q, "answers" if isinstance(a, list) else "answer": a}
        for q, a in zip(queries, answers, strict=True)
    ]
    found = run(tiny, read(write(tmp_path / "exact.jsonl", *rows), delimiter="\nA: ", max_tokens=9))
    assert [own.text for own in found.answers] == said
    assert found.right("acc") == [True, True, False, False, False, True]
    assert found.right("acc_norm") == [True, True, True, False, False, True]
    assert set(found.as_dict(items=True)["items"][0]) == {
        "line",
        "acc",
        "acc_norm",
        "tokens",
        "cut",
        "text",
    }
    for stop, limit in (("e", 1), ("e", None)):
        short = run(
            tiny,
            read(
                write(tmp_path / "exact.jsonl", *rows),
                delimiter="\nA: ",
                stop=(stop,),
                max_tokens=9,
                limit=limit,
            ),
        )
        assert short.count == (limit or 6)
        assert [own.text for own in short.answers] == [
            text.split(stop)[0].strip() for text in said[:limit]
        ]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The  Rhine.", "rhine"),
        ("a U.S. Navy-ship", "us navyship"),
        ("theory and an ant", "theory and ant"),
        ("A", "a"),
        ("...", ""),
        ("Ü", "ü"),
    ],
)
def test_answers_are_normalised_as_squads(text: str, wanted: str) -> None:
    assert normalized(text) == wanted


def test_examples_stand_before_each_question_and_are_not_scored(tiny: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "choices.jsonl", *CHOICES)
    task = read(path, few_shot=1, limit=3, delimiter=": ")
    assert task.before == f"{CHOICES[0]['query']}: fox\n\n" and [
        item.line for item in task.items
    ] == [2, 3, 4]
    expected = scores_by_transformers(
        tiny,
        [
            [(f"{task.before}{row['query']}:", f" {choice}") for choice in row["choices"]]
            for row in CHOICES[1:4]
        ],
    )
    found = run(tiny, task, dtype="float32")
    assert [a.logprobs for a in found.answers] == [
        pytest.approx(logprobs, abs=2e-4) for logprobs in expected
    ]
    schema = read(write(tmp_path / "s.jsonl", *SCHEMAS), few_shot=2)
    assert (
        schema.before
        == f"{SENTENCES[0]} It looks at the hill.\n\n{SENTENCES[45]} It looks at the hill.\n\n"
    )
    exact = read(
        write(
            tmp_path / "e.jsonl",
            {"query": "q", "answers": ["x", "y"]},
            {"query": "r", "answer": "z"},
        ),
        few_shot=1,
        delimiter=" = ",
    )
    assert exact.before == "q = x\n\n"


def test_what_is_longer_than_the_context_is_cut_and_counted(tiny: Path, tmp_path: Path) -> None:
    long = {"query": " ".join(SENTENCES[:40]), "choices": ["fox", "cat"], "gold": 0}
    found = run(tiny, read(write(tmp_path / "long.jsonl", CHOICES[0], long)))
    assert [own.cut for own in found.answers] == [False, True] and found.as_dict()["cut"] == 1
    exact = run(
        tiny,
        read(
            write(
                tmp_path / "exact.jsonl",
                {"query": long["query"], "answer": "x"},
                {"query": "a", "answer": "x"},
            ),
            max_tokens=4,
        ),
    )
    assert [own.cut for own in exact.answers] == [True, False]
    with pytest.raises(
        DataError, match="max_tokens: 128; expected less than the model's context, 128"
    ):
        run(tiny, read(tmp_path / "exact.jsonl", max_tokens=128))
    # 64 tokens, of a context of 128
    small = run(tiny, read(tmp_path / "exact.jsonl", max_tokens=4), cache_bytes=20_000)
    assert [own.cut for own in small.answers] == [True, False]


@pytest.mark.parametrize(
    "rows",
    [CHOICES, SCHEMAS, [{"query": row["query"], "answer": "fox"} for row in CHOICES]],
    ids=["choice", "schema", "exact"],
)
def test_batches_make_no_difference(
    artifact: Path, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    task = read(write(tmp_path / "task.jsonl", *rows), max_tokens=6)
    alone = run(artifact, task, 1, max_batch_size=1, prefix_cache=False)
    assert alone == run(artifact, task, 8) == run(artifact, task, 64, step_tokens=19)


def test_two_models_on_the_same_questions(tiny: Path, artifact: Path, tmp_path: Path) -> None:
    task = read(write(tmp_path / "task.jsonl", *CHOICES))
    a, b = run(tiny, task), run(artifact, task)
    pair = compare(a, b, "acc")
    assert pair.count == 16 and pair.gains - pair.losses == sum(a.right("acc")) - sum(
        b.right("acc")
    )
    assert compare(a, a, "acc").verdict().startswith("the same questions right")
    with pytest.raises(ValueError, match="not the same questions"):
        compare(a, run(tiny, read(tmp_path / "task.jsonl", limit=3)), "acc")


@pytest.mark.shared
@pytest.mark.skipif(
    not (SHARED / "tasks").is_dir(), reason="the shared tasks are not beside this checkout"
)
def test_the_shared_tasks_are_read() -> None:
    counts = {
        "arc_easy": 2376,
        "boolq": 3270,
        "openbook_qa": 500,
        "piqa": 1838,
        "winograd_wsc": 273,
    }
    found = read_tasks([SHARED / "tasks" / f"{name}.jsonl" for name in counts], [Settings()] * 5)
    assert {task.name: len(task.items) for task in found} == counts
    assert [task.chance for task in found] == [
        pytest.approx(c) for c in (0.25, 0.5, 0.25, 0.5, 0.5)
    ]


@pytest.mark.shared
@pytest.mark.skipif(
    not (SHARED / "models").is_dir(),
    reason="the shared models and tasks are not beside this checkout",
)
def test_a_trained_models_answers_are_transformers() -> None:
    folder = SHARED / "models" / "docs-llama-16m"
    task = read(SHARED / "tasks" / "openbook_qa.jsonl", limit=20)
    found = run(folder, task, dtype="float32")
    expected = scores_by_transformers(
        folder,
        [[(context, f" {choice}") for context, choice in item.choices] for item in task.items],
    )
    assert [a.logprobs for a in found.answers] == [
        pytest.approx(logprobs, abs=1e-3) for logprobs in expected
    ]
