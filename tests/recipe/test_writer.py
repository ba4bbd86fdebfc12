"""What is written reads back as it was meant, whatever a model or a file is called."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from quantflow.recipe.writer import Draft, flow, name_of
from quantflow.stages.registry import load_recipe

AWKWARD = [
    "my: model #1",
    "a, b",
    "{x}",
    "[y]",
    "- z",
    "true",
    "null",
    "12",
    "1e5",
    "2026-13-45",
    "0o17",
    ".5e3",
    "1_000",
    "~",
    "",
    " x ",
    "a\nb",
    '"',
    "'",
    "\\",
    "Käfer 🙂",
    "%TAG",
    "@a",
    "*b",
    "&c",
    "!d",
    "?",
    ".",
    "...",
    "---",
    "\x7f\x85\ufeff",
    "x" * 300 + " y" * 300,
]


@pytest.mark.parametrize("text", AWKWARD)
def test_text_reads_back(text: str, tmp_path: Path) -> None:
    assert yaml.safe_load(f"key: {flow(text)}\n") == {"key": text}
    if text.strip() and text != "~":  # which is the home folder
        path = tmp_path / "r.yaml"
        path.write_text(
            Draft(
                "n",
                text,
                {"data": "c4", "samples": 2, "seqlen": 16},
                {"bits": 4},
                ["gptq", {"pack": {"format": "awq"}}],
            ).text
        )
        assert load_recipe(path).model == text
    assert yaml.safe_load(flow({"a": text, "b": [text, 3, True, 0.5]})) == {
        "a": text,
        "b": [text, 3, True, 0.5],
    }
    overrides = [{"match": text or "x", "bits": 3}]
    weights = {
        "bits": 4,
        "group_size": 64,
        "symmetric": False,
        "ignore": [],
        "overrides": overrides,
    }
    found = Draft(
        "n",
        text or "m",
        {"data": text or "c4", "samples": 2, "seqlen": 8},
        weights,
        ["gptq", {"pack": {"format": "gptq"}}],
    )
    read = yaml.safe_load(found.text)
    assert read == {
        "name": "n",
        "model": found.model,
        "calibration": found.calibration,
        "weights": weights,
        "stages": found.stages,
    }


def test_what_needs_no_quotes_has_none() -> None:
    assert (
        flow({"data": "c4", "format": "compressed-tensors", "x": "/a/b.txt"})
        == "{data: c4, format: compressed-tensors, x: /a/b.txt}"
    )


def test_names_are_names_of_recipes(tmp_path: Path) -> None:
    for folder, expected in (
        ("my: model #1", "my-model-1_w4"),
        ("_x", "x_w4"),
        ("模型", "model_w4"),
        ("a.b-C", "a.b-C_w4"),
    ):
        name = name_of(tmp_path / folder, "_w4")
        assert name == expected
        path = tmp_path / "r.yaml"
        path.write_text(
            Draft(
                name,
                "m",
                {"data": "c4", "samples": 2, "seqlen": 16},
                {"bits": 4},
                ["gptq", {"pack": {"format": "awq"}}],
            ).text,
            encoding="utf-8",
        )
        assert load_recipe(path).name == expected
