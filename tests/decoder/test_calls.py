"""What layers of a library class are called with for several texts at once, and what they hand on:
each family's layers one by one against its whole model in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from quantflow.decoder.decoder import open_decoder
from quantflow.errors import ModelError
from quantflow.formats.reader import Weights
from quantflow.models.config import ConfigProblem
from quantflow.models.library import Library
from tests.helpers.library import tiny_config, write_tiny
from tests.helpers.zoo import decoder_logits, random_tokens

OTHERS = {
    "falcon": {},  # layers hand on a tuple
    "falcon with alibi": {"alibi": True},
    "bloom": {},  # a row of positions for each head of each text
    "mpt": {},
    "xglm": {},  # a mask for each text, of exactly that size; learned positions in the outer model
    "biogpt": {},  # the head is called output_projection
    "ctrl": {},  # the head is the embedding, with a bias of its own
}


@pytest.mark.parametrize("name", OTHERS)
def test_layer_by_layer_is_the_whole_model(name: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, name.partition(" ")[0], **OTHERS[name])
    weights, tokens = Weights(folder), random_tokens(3, 12).clamp(min=3)
    assert weights.checkpoint.problems() == []
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(tokens).logits
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(decoder_logits(weights, tokens), expected, rtol=1e-4, atol=2e-5)


def test_a_parent_is_called_with_what_fewer_texts_have(tmp_path: Path) -> None:
    """Bloom's attention reads a row of positions for each head of each text."""
    weights = Weights(write_tiny(tmp_path, "bloom"))
    block = open_decoder(weights.checkpoint, 9, "cpu").block(0, weights.layer(0), torch.float32)
    x = torch.randn(3, 9, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole, *_ = block.readings(x)
        fewer, *_ = block.readings(x[:2])
        assert whole.parent is not None and fewer.parent is not None
        torch.testing.assert_close(whole.parent(whole.source[:2]), fewer.parent(fewer.source))
        assert not torch.equal(whole.parent(whole.source[:2]), whole.source[:2])


def test_numbers_that_json_has_no_word_for() -> None:
    values = json.loads(tiny_config("mamba2").to_json_string(use_diff=False))
    assert values["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert list(Library(values).config.time_step_limit) == [0.0, float("inf")]


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("zamba2", r"share weights \(model.layers.1.\S+ is model.layers.3.\S+ too\)"),
        ("cpmant", "no part for each token"),  # a bias of every pair of tokens, of learned weights
    ],
)
def test_what_fits_into_no_row_is_refused_by_name(
    tmp_path: Path, model_type: str, message: str
) -> None:
    folder = write_tiny(tmp_path, model_type)
    with pytest.raises(ModelError, match=message):
        Weights(folder)


@pytest.mark.parametrize("model_type", ["gpt2", "openai-gpt"])
def test_transposed_weights_are_refused_by_name(model_type: str) -> None:
    with pytest.raises(ConfigProblem, match="transposed, inputs before outputs"):
        Library(json.loads(tiny_config(model_type).to_json_string(use_diff=False)))
