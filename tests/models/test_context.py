"""How long a text may be where the rotary embedding is stretched: the same number for plan, --fit,
engine, report and what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.checkpoints.gguf.config import CONFIG_KEY
from quantflow.checkpoints.gguf.file import Gguf
from quantflow.checkpoints.gguf.header import read_metadata
from quantflow.decoder.rope import inverse_frequencies
from quantflow.engine.config import EngineConfig
from quantflow.engine.engine import Engine
from quantflow.errors import UserError
from quantflow.formats.reader import Weights
from quantflow.models.llama import read_llama_like
from quantflow.pipeline.advice import advise
from quantflow.pipeline.export import Options, export
from quantflow.pipeline.memory import Question
from quantflow.pipeline.plan import make_plan
from quantflow.stages.registry import load_recipe
from tests.helpers.runs import invoke
from tests.helpers.tiny import write_llama, write_text
from tests.helpers.zoo import decoder_logits, random_tokens

LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# max_position_embeddings, rope_scaling, tokens
CONTEXTS: list[tuple[str, int, dict[str, Any] | None, int]] = [
    ("plain", 4096, None, 4096),
    (
        "yarn as Qwen2.5's card says",
        32768,
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        131072,
    ),
    (
        "yarn as Qwen3's card says",
        40960,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        131072,
    ),
    ("yarn without the trained length", 4096, {"type": "yarn", "factor": 16.0}, 65536),
    (
        "yarn, stretched already",
        131072,
        {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
        131072,
    ),
    (
        "yarn, the factor left to the lengths",
        8192,
        {"type": "yarn", "factor": None, "original_max_position_embeddings": 4096},
        8192,
    ),
    (
        "yarn of half a token",
        100,
        {"type": "yarn", "factor": 1.505, "original_max_position_embeddings": 100},
        150,
    ),
    ("linear as Vicuna 16k has it", 4096, {"type": "linear", "factor": 4.0}, 16384),
    (
        "linear, stretched already",
        32768,
        {"type": "linear", "factor": 8.0, "original_max_position_embeddings": 4096},
        32768,
    ),
    ("Llama 3.2", 131072, {**LLAMA3, "original_max_position_embeddings": 8192}, 131072),
    ("dynamic", 2048, {"type": "dynamic", "factor": 2.0}, 2048),
]


@pytest.mark.parametrize(
    ("positions", "scaling", "context"),
    [case[1:] for case in CONTEXTS],
    ids=[case[0] for case in CONTEXTS],
)
def test_the_context_of_configs_that_people_have(
    positions: int, scaling: dict[str, Any] | None, context: int
) -> None:
    config = read_llama_like(
        {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "vocab_size": 10,
            "max_position_embeddings": positions,
            "rope_scaling": scaling,
        }
    )
    assert config.context == context
    assert config.stretches == (scaling is not None and scaling.get("type") == "dynamic")


@pytest.fixture
def yarn(tmp_path: Path) -> Path:
    """128 positions stretched to 512, max_position_embeddings left as it was."""
    return write_llama(
        tmp_path / "yarn", dtype=torch.float32, rope_scaling={"rope_type": "yarn", "factor": 4.0}
    )


def test_beyond_the_trained_length_it_computes_what_transformers_does(yarn: Path) -> None:
    tokens = random_tokens(1, 500)
    model = AutoModelForCausalLM.from_pretrained(
        yarn, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        expected = model(tokens).logits
    torch.testing.assert_close(decoder_logits(Weights(yarn), tokens), expected, rtol=0, atol=2e-4)


def test_engine_plan_and_fit_agree(yarn: Path, tmp_path: Path) -> None:
    assert Engine(yarn, EngineConfig(device="cpu")).context == 512
    assert Engine(yarn, EngineConfig(device="cpu", session_len=512)).context == 512
    with pytest.raises(UserError, match="at most the model's 512 positions"):
        Engine(yarn, EngineConfig(device="cpu", session_len=513))
    text = write_text(tmp_path / "eval.txt")
    for length, fits in ((512, True), (513, False)):
        (tmp_path / "r.yaml").write_text(
            "name: r\nweights: {bits: 8, group_size: 32}\nstages: [rtn, {pack: {format:"
            f" compressed-tensors}}}}, {{evaluate: {{data: {text}, windows: 1, length:"
            f" {length}}}}}]\n"
        )
        recipe = load_recipe(tmp_path / "r.yaml", model=str(yarn), output=str(tmp_path / "out"))
        if fits:
            make_plan(recipe, device="cpu")
        else:
            with pytest.raises(UserError, match="at most the model's 512 positions"):
                make_plan(recipe, device="cpu")
    fitted = advise(Checkpoint(yarn), Question(2**30, 512, 1)).proposal
    assert fitted is not None and fitted.longest_context == 512
    with pytest.raises(UserError, match="at most the model's 512 positions"):
        advise(Checkpoint(yarn), Question(2**30, 513, 1))
    shown = invoke("plan", "--fit", "1GiB", "--model", yarn)
    assert "texts of 512 tokens" in shown.stdout or "text of 512 tokens" in shown.stdout


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_gguf_promises_it_too(kind: str, tmp_path: Path) -> None:
    folder = write_llama(
        tmp_path / kind, dtype=torch.float32, rope_scaling={"rope_type": kind, "factor": 4.0}
    )
    done = export(folder, "gguf", tmp_path / "out", Options())
    metadata = read_metadata(done.output / "model.gguf")
    # llama.cpp's converter gives max_position_embeddings, which for linear is the trained length.
    assert (
        metadata["llama.context_length"] == (512 if kind == "yarn" else 128)
        and metadata["llama.rope.scaling.factor"] == 4.0
    )
    assert Checkpoint(done.output).config.context == 512


@pytest.mark.parametrize("kind", ["yarn", "linear"])
@pytest.mark.parametrize("trained", [None, 128, 64])
def test_the_metadata_alone_say_the_same_length(
    kind: str, trained: int | None, tmp_path: Path
) -> None:
    scaling = {"rope_type": kind, "factor": 4.0} | (
        {"original_max_position_embeddings": trained} if trained else {}
    )
    folder = write_llama(tmp_path / "m", dtype=torch.float32, rope_scaling=scaling)
    raw = (export(folder, "gguf", tmp_path / "out", Options()).output / "model.gguf").read_bytes()
    (tmp_path / "foreign.gguf").write_bytes(raw.replace(CONFIG_KEY.encode(), b"quantflow.nobody"))
    own, read = Checkpoint(folder).config, Checkpoint(tmp_path / "foreign.gguf").config
    assert read.context == own.context == 4 * (trained or 128)
    assert torch.equal(inverse_frequencies(read, 512)[0], inverse_frequencies(own, 512)[0])


def test_a_stretched_context_is_said_once_in_plan(yarn: Path, tmp_path: Path) -> None:
    (note,) = [note for note in Checkpoint(yarn).notes if "512 tokens" in note]
    assert "max_position_embeddings is 128" in note and "yarn" in note and "4 times" in note
    assert not any("tokens" in note for note in Checkpoint(write_llama(tmp_path / "plain")).notes)


def test_a_foreign_gguf_has_the_stretched_length(yarn: Path, tmp_path: Path) -> None:
    """As llama.cpp's converter writes: without our own config."""
    raw = (export(yarn, "gguf", tmp_path / "out", Options()).output / "model.gguf").read_bytes()
    assert raw.count(CONFIG_KEY.encode()) == 1
    (tmp_path / "foreign.gguf").write_bytes(raw.replace(CONFIG_KEY.encode(), b"quantflow.nobody"))
    foreign = Gguf(tmp_path / "foreign.gguf").config
    assert (
        foreign["max_position_embeddings"] == 512
        and foreign["rope_scaling"]["original_max_position_embeddings"] == 128
    )
    read, own = read_llama_like(foreign), Checkpoint(yarn).config
    assert read.context == 512
    assert torch.equal(inverse_frequencies(read, 512)[0], inverse_frequencies(own, 512)[0])


@pytest.mark.parametrize("scaling", [None, {"rope_type": "dynamic", "factor": 2.0}])
def test_a_trained_length_beside_no_stretching_says_nothing(
    tmp_path: Path, scaling: dict[str, Any] | None
) -> None:
    """It ended in a KeyError where no scaling has a factor, and gave a context that nothing
    stretches to."""
    folder = write_llama(
        tmp_path,
        max_position_embeddings=64,
        original_max_position_embeddings=128,
        rope_scaling=scaling,
    )
    checkpoint = Checkpoint(folder)
    assert checkpoint.config.context == 64 and not any(
        "texts may have" in remark for remark in checkpoint.remarks
    )
