"""`quantflow generate` and `quantflow bench` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantflow.evaluate.throughput import memory_table
from tests.helpers.runs import invoke
from tests.helpers.tiny import write_llama


def test_text_json_and_stream_say_the_same(tiny: Path) -> None:
    arguments = [
        "generate", tiny, "--prompt", "The small cat", "--max-tokens", "12", "--device", "cpu",
    ]  # fmt: skip
    text = invoke(*arguments).stdout
    found = json.loads(invoke(*arguments, "--json").stdout)
    assert found[0]["text"] + "\n" == text == invoke(*arguments, "--stream").stdout
    assert (
        found[0]["prompt"] == "The small cat"
        and len(found[0]["token_ids"]) == 12
        and found[0]["finish"] == "length"
    )


def test_several_prompts_a_seed_and_a_dialogue(tiny: Path) -> None:
    arguments = [
        "generate", tiny, "--max-tokens", "6", "--device", "cpu", "--json", "--temperature", "1.5",
        "--seed", "3",
    ]  # fmt: skip
    first, second = json.loads(invoke(*arguments, "--prompt", "A", "--prompt", "B").stdout)
    assert (
        first["token_ids"]
        == json.loads(invoke(*arguments, "--prompt", "A").stdout)[0]["token_ids"]
        != second["token_ids"]
    )
    chat = json.loads(invoke(*arguments, "--prompt", "A", "--chat", "--dialogue", "chatml").stdout)
    assert chat[0]["token_ids"] != first["token_ids"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--max-tokens", "0"], "max_tokens"),
        (["--temperature", "nan"], "temperature"),
        (["--top-p", "2"], "top_p"),
        (["--max-tokens", "5000"], "the model's context is 128"),
        (["--chat"], "no dialogue format"),
        (["--dialogue", "klingon"], "one of baichuan"),
        (["--stream", "--json"], "--stream"),
        (["--session-len", "4096"], "at most the model's 128 positions"),
        (["--cache-max-entry-count", "0"], "cache_max_entry_count"),
    ],
)
def test_what_is_wrong_is_said_in_one_message(tiny: Path, more: list[str], said: str) -> None:
    result = invoke("generate", tiny, "--prompt", "The", "--device", "cpu", *more)
    assert (
        result.exit_code == 2
        and said in result.stderr
        and "Traceback" not in result.stderr
        and not result.stdout
    )


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    (model / "tokenizer.json").unlink()
    result = invoke("generate", model, "--prompt", "The", "--device", "cpu")
    assert (
        result.exit_code == 2 and f"{model}: no tokenizer; expected tokenizer.json" in result.stderr
    )


def test_the_memory_of_bench_is_within_the_models_positions(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", max_position_embeddings=1500)
    assert [row["context"] for row in memory_table(model, [1], [1024, 2048, 4096])] == [1024, 1500]


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    for verb in (
        ["generate", tmp_path, "--prompt", "x"],
        ["verify", tmp_path],
        ["bench", tmp_path],
    ):
        result = invoke(*verb)
        assert result.exit_code == 2 and "config.json" in result.stderr


def test_bench_measures_every_row(artifact: Path, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    reference = artifact.parents[1] / "model"
    arguments = [
        "--reference", reference, "--batch", "2", "--prompt", "16", "--new", "4", "--device",
        "cpu", "--output", output,
    ]  # fmt: skip
    result = invoke("bench", artifact, *arguments)
    assert result.exit_code == 0, result.output
    record = json.loads(output.read_text())
    rows = {row["case"]["name"]: row for row in record["rows"]}
    assert list(rows) == [
        "full precision",
        "KV int8",
        "weights",
        "weights + KV int8",
        "transformers",
    ]
    for row in rows.values():
        assert row["first_token_s"] > 0 and row["prefill_tokens_s"] == pytest.approx(
            32 / row["first_token_s"]
        )
        assert row["decode_tokens_s"] > 0 and row["step_ms"] > 0
    # Two layers, two KV heads of 16, two sequences of one block of 64: in bfloat16 and in int8.
    assert rows["weights"]["cache_bytes"] == 2 * 64 * 2 * 2 * 2 * 16 * 2
    assert rows["weights + KV int8"]["cache_bytes"] == rows["weights"]["cache_bytes"] // 2
    assert rows["weights"]["weight_bytes"] < rows["full precision"]["weight_bytes"]
    memory = next(m for m in record["memory"] if m["context"] == 128)
    assert memory["kv_bytes"] == 2 * 128 * 2 * 2 * 2 * 16 * 2 == 2 * memory["kv_int8_bytes"]
    assert record["date"] and record["torch"] and record["mode"] == "exact"
    wrong = invoke("bench", artifact, "--batch", "0")
    assert wrong.exit_code == 2


def test_a_prompt_is_an_argument_an_option_or_comes_through_a_pipe(tiny: Path) -> None:
    more = ["--max-tokens", "6", "--device", "cpu"]
    option = invoke("generate", tiny, "--prompt", "The small cat", *more)
    assert option.exit_code == 0 and option.stdout.strip()
    for given in (
        invoke("generate", tiny, "The small cat", *more),
        invoke("generate", tiny, *more, text="The small cat\n"),
        invoke("generate", tiny, "-", *more, text="The small cat\n"),
    ):
        assert (given.exit_code, given.stdout) == (0, option.stdout)
    several = json.loads(
        invoke("generate", tiny, "A", "-", "--prompt", "C", *more, "--json", text="B").stdout
    )
    assert [found["prompt"] for found in several] == ["A", "B", "C"]
    twice = invoke("generate", tiny, "-", "-", *more, text="B")
    assert twice.exit_code == 2 and "stdin more than once" in twice.stderr


def test_what_the_engine_does_is_said_when_asked_for(tiny: Path) -> None:
    arguments = ["generate", tiny, "The", "--max-tokens", "2", "--device", "cpu"]
    quiet, told = invoke(*arguments), invoke(*arguments, "-v")
    assert quiet.stdout == told.stdout and not quiet.stderr
    assert (
        told.stderr.startswith("mode: exact, device: cpu")
        and invoke(*arguments, "--verbose").stderr == told.stderr
    )
