"""`quantflow eval` as it is typed: the form with text (its figures are tested in tests/evaluate),
and the form with questions."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from quantflow import __version__
from tests.helpers.runs import invoke
from tests.helpers.tiny import SENTENCES

ROWS = [
    {
        "query": f"{SENTENCES[9 * i]} The",
        "choices": ["fox", "jumps over the river", "cat"],
        "gold": i % 3,
    }
    for i in range(12)
]
ANSWERS = [{"query": f"{SENTENCES[i]}", "answer": "fox"} for i in range(5)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[object]:
    return [
        "--tasks",
        write(tmp_path / "pets.jsonl", ROWS),
        "--tasks",
        write(tmp_path / "words.jsonl", ANSWERS),
        "--device",
        "cpu",
    ]


def test_one_model(tiny: Path, files: list[object], tmp_path: Path) -> None:
    output = tmp_path / "deep" / "scores.json"
    arguments = [
        "eval", tiny, *files, "--delimiter", "\\nAnswer: ", "--delimiter", " ", "--max-tokens",
        "5", "--output", output,
    ]  # fmt: skip
    found = json.loads(invoke(*arguments, "--json").stdout)
    pets, words = found["tasks"]["pets"], found["tasks"]["words"]
    assert pets["settings"]["delimiter"] == "\nAnswer: " and words["settings"]["delimiter"] == " "
    assert (pets["form"], pets["count"], pets["chance"]) == (
        "multiple choice",
        12,
        pytest.approx(1 / 3),
    )
    assert (words["form"], words["count"], words["chance"]) == ("exact match", 5, None)
    assert (
        found["reference"] is None
        and "reference" not in pets
        and "paired" not in found["all"]["exact match"]
        and "items" not in pets["model"]
    )
    written = json.loads(output.read_text())
    items = written["tasks"]["pets"]["model"]["items"]
    assert [item["line"] for item in items] == list(range(1, 13)) and all(
        len(item["logprobs"]) == 3 for item in items
    )
    assert sum(item["acc"] for item in items) / 12 == pets["model"]["acc"]["value"]
    right = [item["acc_norm"] for item in items]
    pooled = found["all"]["multiple choice"]
    assert pooled["model"]["acc_norm"]["value"] == sum(right) / 12 and {
        f: o["count"] for f, o in found["all"].items()
    } == {"multiple choice": 12, "exact match": 5}
    assert written["quantflow"] == __version__ and written["reference_weights"] is None
    questions = {Path(task["file"]).name: task["sha256"] for task in (pets, words)}
    for digests, path in ((written["weights"], tiny), (questions, tmp_path)):
        assert len(digests) == 2
        for name, sha256 in digests.items():
            assert sha256 == hashlib.sha256((path / name).read_bytes()).hexdigest()
    table = invoke(*arguments)
    assert (
        table.exit_code == 0
        and f"{pets['model']['acc']['value'] * 100:.1f} (" in table.stdout
        and "pets" in table.stdout
    )


def test_two_models(artifact: Path, files: list[object], tmp_path: Path) -> None:
    reference, output = artifact.parents[1] / "model", tmp_path / "scores.json"
    arguments = [
        "eval", artifact, "--reference", reference, *files, "--output", output, "--batch", "5",
        "--max-tokens", "3",
    ]  # fmt: skip
    found = json.loads(invoke(*arguments, "--json").stdout)
    written = json.loads(output.read_text())["tasks"]
    for name, task in found["tasks"].items():
        ours, theirs = (
            [item["acc"] for item in written[name][which]["items"]]
            for which in ("model", "reference")
        )
        pair = task["paired"]["acc"]
        assert pair["losses"] == sum(r and not m for m, r in zip(ours, theirs, strict=True))
        assert pair["difference"] == pytest.approx(
            task["model"]["acc"]["value"] - task["reference"]["acc"]["value"]
        )
        assert pair["interval"][0] < pair["difference"] < pair["interval"][1]
        assert found["all"][task["form"]]["paired"] == task["paired"], (
            "one task of a form is all of it"
        )
    assert (
        "int8" in found["engine"]["KV cache"]
        and "int8" not in found["reference_engine"]["KV cache"]
    )
    text = invoke(*arguments).stdout
    assert "artifact less model" in text and "excluded at 95%" in text and "all" not in text.split()
    # The file says the same whatever the batch.
    again = json.loads(invoke(*arguments, "--json", "--batch", "64").stdout)
    for name, task in again["tasks"].items():
        assert (
            json.loads(output.read_text())["tasks"][name]["model"]["items"]
            == written[name]["model"]["items"]
        )
        assert task["paired"] == found["tasks"][name]["paired"]


def test_forms_are_not_mixed(tiny: Path, tmp_path: Path) -> None:
    """Two files of choices and two of exact answers: what is pooled is of one form."""
    given = {"a": ROWS[:5], "b": ROWS[5:], "c": ANSWERS[:2], "d": ANSWERS[2:]}
    files = [
        part
        for name, rows in given.items()
        for part in ("--tasks", write(tmp_path / f"{name}.jsonl", rows))
    ]
    base = [
        "eval", tiny, "--reference", tiny, *files, "--device", "cpu", "--max-tokens", "3", "--kv",
        "dynamic",
    ]  # fmt: skip
    found = json.loads(invoke(*base, "--json").stdout)
    for form, names, count in (("multiple choice", "ab", 12), ("exact match", "cd", 5)):
        own, tasks = found["all"][form], [found["tasks"][name] for name in names]
        assert own["count"] == count
        for metric in ("acc", "acc_norm"):
            right = [round(task["model"][metric]["value"] * task["count"]) for task in tasks]
            assert own["model"][metric]["value"] == pytest.approx(sum(right) / count)
            for key in ("losses", "gains"):
                assert own["paired"][metric][key] == sum(
                    task["paired"][metric][key] for task in tasks
                )
    shown = " ".join(
        invoke(*base[:2], *files, "--device", "cpu", "--max-tokens", "3").stdout.split()
    )
    assert "all multiple choice 12" in shown and "all exact match 5" in shown
    one = " ".join(invoke(*base[:2], *files[:4], "--device", "cpu").stdout.split())
    assert "all 12" in one


def test_both_models_are_looked_at_before_the_first_is_run(
    tiny: Path, files: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "quantflow.engine.engine.Engine.__init__", lambda *a, **k: pytest.fail("a model was run")
    )
    statistics, mute, torn = (tmp_path / name for name in ("statistics", "mute", "torn"))
    statistics.mkdir()
    (statistics / "quantflow.json").write_text('{"formats": {}}')
    shutil.copytree(tiny, mute)
    (mute / "tokenizer.json").unlink()
    shutil.copytree(tiny, torn)
    (torn / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:-100])
    for second, said in (
        (tmp_path / "nowhere", "no such directory"),
        (statistics, "an artifact of statistics alone"),
        (mute, "no tokenizer"),
        (torn, "torn"),
    ):
        for pair in ((tiny, second), (second, tiny)):
            result = invoke("eval", pair[0], "--reference", pair[1], *files)
            assert result.exit_code == 2 and said in " ".join(result.stderr.split()), result.output
    both = " ".join(invoke("eval", mute, "--reference", statistics, *files).stderr.split())
    assert "no tokenizer" in both and "statistics alone" in both


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            [],
            [
                "2 problems",
                "--reference: not given",
                "--data: not given; expected text, or --tasks with questions",
            ],
        ),
        (
            ["--data", "x.txt", "--limit", "3", "--batch", "2"],
            ["--limit: given without --tasks", "--batch: given", "--reference: not given"],
        ),
        (
            ["--data", "x.txt", "--reference", "y", "--kv", "int8"],
            ["--kv: given without --engine or --tasks"],
        ),
        (
            ["--tasks", "PETS", "--data", "x.txt", "--engine"],
            ["--data: given with --tasks", "--engine: given with --tasks"],
        ),
        (
            ["--tasks", "PETS", "--delimiter", "a", "--delimiter", "b"],
            ["--delimiter: 2 of them; expected one, or 1: one a file"],
        ),
        (["--tasks", "PETS", "--tasks", "PETS"], ["a second task called pets"]),
        (["--tasks", "PETS", "--few-shot", "12"], ["12 questions; expected more than the 12"]),
        (["--tasks", "PETS", "--reference", "nowhere"], ["nowhere: no such directory"]),
        (["--tasks", "PETS", "--output", "/"], ["--output /: a directory; expected a file"]),
        (["--tasks", "BAD"], ["bad.jsonl:1: not JSON", "bad.jsonl:2: an empty object"]),
    ],
)
def test_what_is_wrong_is_said_at_once(
    tiny: Path, tmp_path: Path, arguments: list[str], said: list[str]
) -> None:
    pets, bad = write(tmp_path / "pets.jsonl", ROWS), tmp_path / "bad.jsonl"
    bad.write_text("{\n{}\n")
    places = {"PETS": str(pets), "BAD": str(bad)}
    result = invoke("eval", tiny, *(places.get(part, part) for part in arguments))
    message = " ".join(result.stderr.split())
    assert result.exit_code == 2 and all(part in message for part in said), message
    assert "Traceback" not in message and not result.stdout
