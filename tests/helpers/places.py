"""What the pages' commands call `./internlm-chat-7b`, `my_text.txt` and so on: each is made, small,
when the first command names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.helpers.pages import ROOT, blocks
from tests.helpers.runs import invoke, reduced
from tests.helpers.tiny import SENTENCES, write_llama, write_text


def _internlm(place: Path) -> None:
    """InternLM with its own names, biases and remote-code config, in float16; wide enough for
    groups of 128 on two ranks."""
    write_llama(
        place,
        dtype=torch.float16,
        hidden_size=256,
        intermediate_size=512,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        model_type="internlm",
        architectures=["InternLMForCausalLM"],
        bias=True,
        auto_map={"AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM"},
    )
    tensors = load_file(place / "model.safetensors")
    for i in range(2):
        for letter in "qkvo":
            tensors[f"model.layers.{i}.self_attn.{letter}_proj.bias"] = (
                torch.randn(256, generator=torch.manual_seed(i)).mul(0.05).half()
            )
    save_file(tensors, place / "model.safetensors", {"format": "pt"})


def _model(place: Path) -> None:
    write_llama(place, hidden_size=128, intermediate_size=256, max_position_embeddings=2048)


def _their_awq(place: Path) -> None:
    """Such as another tool wrote it: the checkpoint's files, and nothing of ours."""
    provide("my-model")
    made = place.parent / "made"
    assert (
        invoke(
            *reduced(["run", "recipes/auto_awq.yaml", "--model", "my-model", "--output", str(made)])
        ).exit_code
        == 0
    )
    for name in ("quantflow.json", "report.json", "report.html", "run.json"):
        (made / name).unlink()
    shutil.move(made, place)


def _symmetric(place: Path) -> None:
    provide("my-model")
    recipe = place.parent / "symmetric.yaml"
    recipe.write_text(
        "name: symmetric\nweights: {group_size: 32, symmetric: true}\nstages: [rtn, {pack: {format:"
        " compressed-tensors}}]\n"
    )
    assert invoke("run", recipe, "--model", "my-model", "--output", place).exit_code == 0


def _demo(name: str) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        result = invoke(*reduced(["run", f"recipes/{name}.yaml", "--output", str(place)]))
        assert result.exit_code == 0, result.output + result.stderr

    return make


def _questions(place: Path) -> None:
    choices = ["river", "hill", "house"]
    lines = (
        {"query": sentence, "choices": choices, "gold": i % 3}
        for i, sentence in enumerate(SENTENCES[:6])
    )
    place.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _task(place: Path) -> None:
    """The one of docs/tasks.md, and the file that it reads."""
    provide("arc_easy.jsonl")
    (text,) = (block.text for block in blocks() if block.text.startswith("task: my_task"))
    place.write_text(text)


def _fitted(place: Path) -> None:
    provide("internlm-chat-7b")
    recipe = place.parent / "fitted.yaml"
    recipe.write_text(
        "name: fitted\nweights: {group_size: 32}\nstages: [rtn, {pack: {format:"
        " compressed-tensors}}]\n"
    )
    assert invoke("run", recipe, "--model", "internlm-chat-7b", "--output", place).exit_code == 0


def _release(place: Path) -> None:
    result = invoke(
        *reduced(
            [
                "release",
                "recipes/demo_w4_kv8.yaml",
                "recipes/demo_gguf.yaml",
                "--output",
                str(place),
            ]
        )
    )
    assert result.exit_code == 0, result.output + result.stderr


def _lines(first: int, last: int) -> Callable[[Path], None]:
    return lambda place: place.write_text(
        "".join(
            json.dumps({"text": " ".join(SENTENCES[i : i + 4])}) + "\n"
            for i in range(first, last, 4)
        )
    )


PLACES: dict[str, Callable[[Path], object]] = {
    "recipes": lambda place: place.symlink_to(ROOT / "recipes"),
    "calib_data": lambda place: place.symlink_to(ROOT / "calib_data"),
    "c4.jsonl": _lines(0, 128),
    "pileval.jsonl": _lines(0, 128),
    "wikitext2.txt": lambda place: write_text(place, 128, 256),
    "my_text.txt": lambda place: write_text(place, 128, 256),
    "my-model": _model,
    "internlm-chat-7b": _internlm,
    "their-awq": _their_awq,
    "SOURCE": _symmetric,
    "artifacts/demo_w4_kv8": _demo("demo_w4_kv8"),
    "artifacts/demo_gguf": _demo("demo_gguf"),
    "artifacts/internlm-chat-7b_w4_kv8": _fitted,
    "artifacts/release": _release,
    "docs-llama-16m": _model,
    "calib.txt": lambda place: write_text(place, 0, 128),
    "my_task.yaml": _task,
    **dict.fromkeys(
        ("arc_easy.jsonl", "piqa.jsonl", "openbook_qa.jsonl", "winograd_wsc.jsonl"), _questions
    ),
}
"""What pages name -> how it is made. A new placeholder is a line here."""
ALWAYS = "recipes calib_data c4.jsonl wikitext2.txt"
"""What `tests.helpers.runs.reduced` reads, whatever a command names."""


def provide(text: str) -> None:
    """Makes what a text names and is not there yet, in the current directory."""
    for name, make in PLACES.items():
        place = Path(name)
        if name in text and not place.exists():
            place.parent.mkdir(exist_ok=True)
            make(place)
