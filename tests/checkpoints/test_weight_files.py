"""Which files of a directory are read: those that transformers itself opens, and what it does not
see is named or refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantflow.checkpoints.checkpoint import Checkpoint, resolve_model
from quantflow.checkpoints.directory import Directory
from quantflow.errors import ModelError
from tests.helpers.runs import invoke
from tests.helpers.tiny import write_llama

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
LORA = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)}
MISTRAL = {"layers.0.attention.wq.weight": torch.zeros(64, 64), "norm.weight": torch.zeros(64)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model")


def weights(folder: Path, name: str = WHOLE) -> dict[str, Tensor]:
    return load_file(folder / name)


def shards(
    folder: Path, *, index: bool = True, whole: bool = False, change: bool = False
) -> dict[str, Tensor]:
    """The weights in two shards; with `change`, other weights. whole: beside what was there."""
    tensors = {name: tensor + 1 if change else tensor for name, tensor in weights(folder).items()}
    names = sorted(tensors)
    parts = {FIRST: names[:10], SECOND: names[10:]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
    if index:
        weight_map = {name: file for file, own in parts.items() for name in own}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if not whole:
        (folder / WHOLE).unlink()
    return tensors


def as_transformers_reads(folder: Path) -> None:
    """The weights are those of the model that transformers makes of the directory."""
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True
    ).state_dict()
    ours = Checkpoint(folder)
    assert not ours.problems()
    for name in ours.expected:
        assert torch.equal(ours.tensor(name), theirs[name]), name


@pytest.mark.parametrize(
    ("name", "tensors", "why"),
    [
        ("consolidated.safetensors", MISTRAL, "model.safetensors is what transformers opens"),
        ("adapter_model.safetensors", LORA, "an adapter, which is not merged"),
        (
            "model.fp16.safetensors",
            {"lm_head.weight": torch.ones(320, 64)},
            "model.safetensors is what transformers opens",
        ),
        (
            "extra-00001-of-00002.safetensors",
            {"lm_head.weight": torch.ones(320, 64)},
            "model.safetensors is what transformers opens",
        ),
    ],
)
def test_a_stray_file_is_left_out_and_named(
    folder: Path, name: str, tensors: dict[str, Tensor], why: str
) -> None:
    save_file(tensors, folder / name)
    as_transformers_reads(folder)
    assert Directory(folder).left_out_files == {name: why}
    assert f"not read: {name} ({why})" in Checkpoint(folder).notes
    assert f"not read: {name}" in " ".join(
        invoke("inspect", folder).stdout.replace("│", " ").split()
    )
    assert (
        f"note: not read: {name}"
        in invoke("generate", folder, "--prompt", "The", "--max-tokens", 1).stderr
    )


def test_beside_what_an_index_names(folder: Path) -> None:
    shards(folder)
    save_file(LORA, folder / "adapter_model.safetensors")
    save_file({"lm_head.weight": torch.ones(320, 64)}, folder / "head.safetensors")
    as_transformers_reads(folder)
    said = {
        "adapter_model.safetensors": "an adapter, which is not merged",
        "head.safetensors": f"{INDEX} does not name it",
    }
    assert Directory(folder).left_out_files == said


def test_other_formats_are_named_and_what_is_no_model_is_not(folder: Path) -> None:
    for name in (
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
        "consolidated.00.pth",
        "model.gguf",
    ):
        (folder / name).write_bytes(b"anything")
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth", "._model.safetensors"):
        (folder / name).write_bytes(b"anything")
    as_transformers_reads(folder)
    (note,) = (note for note in Checkpoint(folder).notes if note.startswith("not read"))
    names = "consolidated.00.pth, model.gguf, pytorch_model-00001-of-00002.bin and 1 more"
    assert note == f"not read: {names} (safetensors files hold the weights)"


@pytest.mark.parametrize("index", [True, False])
def test_shards_beside_the_whole_that_say_the_same(folder: Path, index: bool) -> None:
    shards(folder, index=index, whole=True)
    as_transformers_reads(folder)
    assert [file.name for file in Checkpoint(folder).files] == [WHOLE]
    assert set(Directory(folder).left_out_files) == {FIRST, SECOND}
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:-100])  # or the half of a download
    (folder / SECOND).unlink()
    as_transformers_reads(folder)


@pytest.mark.parametrize("index", [True, False])
def test_shards_beside_the_whole_that_say_something_else(folder: Path, index: bool) -> None:
    shards(folder, index=index, whole=True, change=True)
    with pytest.raises(
        ModelError,
        match=(
            rf"model\.safetensors and shards such as {FIRST}, which differ in lm_head\.weight.*move"
            r" away"
        ),
    ):
        Directory(folder)


@pytest.mark.parametrize("where", [0, 70_000, -70_000, -1])
def test_one_byte_anywhere_makes_another_copy(folder: Path, where: int) -> None:
    """Of two copies one is not read: what is called a copy has been compared whole."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(100, 2048, dtype=torch.int16).view(torch.float16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_file(tensors, folder / FIRST, {"format": "pt"})
    assert FIRST in Directory(folder).left_out_files
    tensors["lm_head.weight"].view(-1).view(torch.uint8)[where] += 1
    save_file(tensors, folder / FIRST, {"format": "pt"})
    os.utime(folder / FIRST, ns=(1, 1))  # the clock of files ticks every few milliseconds
    with pytest.raises(ModelError, match=r"which differ in lm_head\.weight"):
        Directory(folder)


def test_shards_beside_the_whole_that_say_more(folder: Path) -> None:
    save_file({"model.layers.2.input_layernorm.weight": torch.ones(64)}, folder / FIRST)
    with pytest.raises(
        ModelError, match=r"which differ in model\.layers\.2\.input_layernorm\.weight"
    ):
        Directory(folder)


def test_shards_without_an_index(folder: Path) -> None:
    tensors = shards(folder, index=False)
    save_file(MISTRAL, folder / "consolidated.safetensors")
    checkpoint = Checkpoint(folder)
    assert not checkpoint.problems()
    assert all(torch.equal(checkpoint.tensor(name), tensors[name]) for name in checkpoint.expected)
    assert set(Directory(folder).left_out_files) == {"consolidated.safetensors"}
    (folder / FIRST).unlink()
    with pytest.raises(
        ModelError, match=rf"missing shard {FIRST}; expected all of 2, as {SECOND} says"
    ):
        Directory(folder)


def test_shards_of_two_numberings(folder: Path) -> None:
    shards(folder, index=False)
    shutil.copy(folder / FIRST, folder / "model-00001-of-00003.safetensors")
    with pytest.raises(ModelError, match=rf"{FIRST}, model-00001-of-00003\.safetensors"):
        Directory(folder)


def test_a_single_file_of_another_name(folder: Path) -> None:
    tensors = weights(folder)
    (folder / WHOLE).rename(folder / "weights.safetensors")
    save_file(LORA, folder / "adapter_model.safetensors")
    checkpoint = Checkpoint(folder)
    assert all(torch.equal(checkpoint.tensor(name), tensors[name]) for name in checkpoint.expected)
    shutil.copy(folder / "weights.safetensors", folder / "model.fp16.safetensors")
    with pytest.raises(
        ModelError,
        match=(
            r"2 files or sets of shards: model\.fp16\.safetensors, weights\.safetensors;.*Call the"
            r" one that"
        ),
    ):
        Directory(folder)


@pytest.mark.parametrize(
    ("name", "tensors", "said"),
    [
        (
            "adapter_model.safetensors",
            LORA,
            r"adapter_model\.safetensors alone, an adapter.*merge_and_unload",
        ),
        (
            "consolidated.safetensors",
            MISTRAL,
            r"consolidated\.safetensors alone, in Mistral's own layout",
        ),
    ],
)
def test_what_is_no_model_alone(
    folder: Path, name: str, tensors: dict[str, Tensor], said: str
) -> None:
    (folder / WHOLE).unlink()
    save_file(tensors, folder / name)
    with pytest.raises(ModelError, match=said):
        Directory(folder)


def test_a_tensor_that_the_index_forgot(folder: Path) -> None:
    """transformers reads every tensor of a shard, whatever the index lists."""
    shards(folder)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    as_transformers_reads(folder)


def test_a_tensor_in_two_shards_of_an_index(folder: Path) -> None:
    shards(folder)
    first, second = weights(folder, FIRST), weights(folder, SECOND)
    save_file(
        second | {"lm_head.weight": first["lm_head.weight"]}, folder / SECOND, {"format": "pt"}
    )
    as_transformers_reads(folder)
    save_file(
        second | {"lm_head.weight": first["lm_head.weight"] + 1}, folder / SECOND, {"format": "pt"}
    )
    with pytest.raises(
        ModelError, match=rf"{SECOND}: tensor lm_head\.weight stands in two files, also in {FIRST}"
    ):
        Directory(folder)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ("adapter_config.json", "It is an adapter"),
        ("params.json", "It is the layout of the model's maker"),
        ("inside/config.json", "Give the directory inside: .*inside"),
        ("readme.md", "Is the download complete"),
    ],
)
def test_a_directory_without_a_config(tmp_path: Path, there: str, said: str) -> None:
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("{}")
    with pytest.raises(
        ModelError,
        match=rf"config\.json: No such file or directory; expected a model directory\. {said}",
    ):
        Directory(tmp_path)


@pytest.mark.parametrize("name", [WHOLE, "config.json"])
def test_a_file_in_place_of_its_directory(folder: Path, name: str) -> None:
    with pytest.raises(
        ModelError,
        match=(
            r"a file; expected a model directory, or a \.gguf file\. Give the directory .*:"
            rf" {folder}"
        ),
    ):
        resolve_model(str(folder / name))
