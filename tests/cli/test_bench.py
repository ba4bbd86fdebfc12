"""`quantflow bench`: what is refused before anything is measured."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.helpers.runs import invoke
from tests.helpers.tiny import write_llama


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and another one as a GGUF file."""
    folder = tmp_path_factory.mktemp("bench")
    other = write_llama(folder / "other", intermediate_size=96, num_hidden_layers=1)
    assert invoke("export", other, "--format", "gguf", "--output", folder / "gguf").exit_code == 0
    return write_llama(folder / "model"), next((folder / "gguf").glob("*.gguf"))


def refused(model: Path, gguf: Path, *said: str) -> None:
    result = invoke("bench", model, "--gguf", gguf, "--batch", "1", "--prompt", "4", "--new", "2")
    assert result.exit_code == 2, result.output
    assert all(part in " ".join(result.output.split()) for part in said), result.output
    assert "bench:" not in result.output  # no step was begun


def test_a_gguf_file_that_is_not_there(models: tuple[Path, Path], tmp_path: Path) -> None:
    refused(models[0], tmp_path / "none.gguf", "none.gguf", "quantflow export DIR --format gguf")


def test_without_llama_cpp(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "llama_cpp" else find(name, *more))
    refused(*models, "llama-cpp-python is not installed", "pip install llama-cpp-python")


def test_a_gguf_file_of_another_model(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: find("json") if name == "llama_cpp" else find(name, *more))
    refused(*models, "1 layers, hidden 64", "2 layers, hidden 64")
