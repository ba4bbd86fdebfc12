"""Every decoder that the installed transformers knows, against the table that users read: a new
release, or a change here, shows up as a row that is another one."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quantflow.models.kinds import decoders, no_decoder
from tests.families.table import PAGE, row, rows

TABLE = rows(PAGE.read_text(encoding="utf-8"))
# In the ordinary suite: a table's, one norm for attention and MLP, tuples, experts, layers of two
# kinds of which one caches no K and V.
FEW = ("qwen2", "cohere2", "falcon", "deepseek_v3", "qwen3_next")

# What classes warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_model_type_has_a_row() -> None:
    assert list(TABLE) == list(decoders()), "run: make models-table"


@pytest.mark.models
@pytest.mark.parametrize("model_type", list(decoders()))
def test_a_model_type_does_what_its_row_says(model_type: str, tmp_path: Path) -> None:
    assert row(model_type, tmp_path) == TABLE.get(model_type), "run: make models-table"


@pytest.mark.parametrize("model_type", FEW)
def test_a_few_do_what_their_rows_say(model_type: str, tmp_path: Path) -> None:
    assert row(model_type, tmp_path) == TABLE[model_type]


def test_what_is_no_decoder_of_text() -> None:
    """By name, as one knows them."""
    others = {name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if no_decoder(name)}
    assert {"bert", "roberta", "xlm-roberta", "electra", "bart", "whisper", "musicgen"} <= others
    assert others.isdisjoint({"llama", "gpt2", "gpt_neox", "modernbert-decoder", "qwen3_next"})
    assert no_decoder("bert") != no_decoder("bart")
