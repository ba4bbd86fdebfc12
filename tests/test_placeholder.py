"""What a clone or a download leaves in a file's place is told apart by every reader, and by no word
taken for the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.errors import UserError
from quantflow.evaluate.tasks import Settings, read_tasks
from quantflow.pipeline.export import export
from quantflow.placeholder import placeholder
from quantflow.stages.registry import load_recipe
from quantflow.tokenizers.export import export_tokenizer
from quantflow.tokenizers.load import load_tokenizer, tokenizer_placeholders
from tests.helpers.tiny import write_llama

# As git-lfs' own specification spells it.
DIGEST = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{DIGEST}\nsize 4976698672\n"
POINTED = (
    r"{}: a Git LFS pointer, not the file; expected the file itself \(of 4976698672 bytes\)\. Run"
    r" `git lfs pull`"
)


def as_tokenizer(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        if name not in ("tokenizer.json", "tokenizer_config.json"):
            (folder / "tokenizer.json").unlink()
        if name == "merges.txt":
            (folder / "vocab.json").write_text(
                json.dumps({token: i for i, token in enumerate(ByteLevel.alphabet())})
            )
        return load_tokenizer(folder)

    return read


READERS: dict[str, Callable[[Path], object]] = {
    "config.json": Checkpoint,
    "model.safetensors": Checkpoint,
    "model.safetensors.index.json": lambda folder: (
        (folder / "model.safetensors").unlink(),
        Checkpoint(folder),
    ),
    **{
        name: as_tokenizer(name)
        for name in (
            "tokenizer.json",
            "tokenizer_config.json",
            "tokenizer.model",
            "vocab.json",
            "merges.txt",
            "qwen.tiktoken",
        )
    },
    **{
        name: lambda folder: export_tokenizer(folder, folder / "out")
        for name in (
            "chat_template.jinja",
            "generation_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
        )
    },
    "model.gguf": lambda folder: Checkpoint(folder / "model.gguf"),
    "recipe.yaml": lambda folder: load_recipe(folder / "recipe.yaml"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_git_lfs_pointer_is_called_that(tmp_path: Path, name: str) -> None:
    folder = write_llama(tmp_path / "model")
    (folder / name).write_text(LFS)
    with pytest.raises(UserError, match=POINTED.format(name.replace(".", r"\."))):
        READERS[name](folder)


def test_in_a_workspace(tmp_path: Path) -> None:
    export(write_llama(tmp_path / "model"), "turbomind", tmp_path / "workspace")
    weights = tmp_path / "workspace/triton_models/weights"
    for name in ("layers.0.attention.wo.0.weight", "config.ini"):
        shutil.copytree(tmp_path / "workspace", tmp_path / name)
        (tmp_path / name / weights.relative_to(tmp_path / "workspace") / name).write_text(LFS)
        with pytest.raises(UserError, match=POINTED.format(name)):
            Checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file (0 bytes)"),
        (LFS.encode(), "a Git LFS pointer"),
        (
            b"version https://hawser.github.com/spec/v1\noid sha256:00\nsize 5\n",
            "a Git LFS pointer",
        ),
        (b"# xet version 0\nfilesize = 5\nhash = '00'\n", "a Xet pointer"),
        (b"../../.git/annex/objects/Xk/2J/SHA256E-s5--00/SHA256E-s5--00", "a git-annex pointer"),
        (b"/annex/objects/SHA256E-s5--00\n", "a git-annex pointer"),
        (b"\xef\xbb\xbf\r\n<!DOCTYPE html><html><body>Log in", "a web page"),
        (b"<html><head><title>403 Forbidden</title>", "a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page"),
        (bytes(1024), "nothing but zeros"),
        (b"Entry not found", "a text that begins 'Entry not found'"),
        (b'{"error":"Invalid username or password."}', "a text that begins"),
        ("Accès refusé".encode(), "a text that begins 'Accès refusé'"),
    ],
)
def test_what_a_weight_file_is_instead(tmp_path: Path, content: bytes, said: str) -> None:
    folder = write_llama(tmp_path)
    for name in ("model.safetensors", "model.gguf"):
        (folder / name).write_bytes(content)
        with pytest.raises(UserError) as refused:
            Checkpoint(folder / name if name.endswith(".gguf") else folder)
        assert f"{name}: {said}" in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"a": 1}',
        "plain",
        "version 2",
        "<s>",
        "# a recipe\nmodel: x",
        "size 5",
        "{{ bos_token }}",
        "0",
    ],
)
def test_what_is_a_file(text: str) -> None:
    assert placeholder(Path("a"), text.encode()) is None


@pytest.mark.parametrize("content", [b"", LFS.encode(), b"<html>"])
def test_an_empty_config_and_a_page(tmp_path: Path, content: bytes) -> None:
    folder = write_llama(tmp_path)
    (folder / "config.json").write_bytes(content)
    with pytest.raises(
        UserError, match=r"config\.json: a(n empty file| Git LFS pointer| web page)"
    ):
        Checkpoint(folder)


def test_a_plan_looks_at_the_tokenizer_too(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    assert tokenizer_placeholders(folder) == []
    names = [
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "additional_chat_templates/tool_use.jinja",
    ]
    (folder / "additional_chat_templates").mkdir()
    for name in names:
        (folder / name).write_text(LFS)
    assert [
        Path(problem.where).relative_to(folder).as_posix()
        for problem in tokenizer_placeholders(folder)
    ] == names


def test_a_file_of_questions(tmp_path: Path) -> None:
    (tmp_path / "arc.jsonl").write_text(LFS)
    with pytest.raises(UserError, match=POINTED.format(r"arc\.jsonl")):
        read_tasks([tmp_path / "arc.jsonl"], [Settings()])
