"""The documents of a data set as a model sees them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from quantflow import bundled
from quantflow.calibration.data import Document, joined, read_documents
from quantflow.calibration.shapes import Conversation
from quantflow.engine.text import OFFLINE_DATE, Text
from quantflow.errors import Problem
from quantflow.recipe import NamesText
from quantflow.tokenizers.chat_templates import chat_template
from quantflow.tokenizers.load import has_tokenizer


def model_documents(
    folder: Path,
    data: str,
    file: str | None = None,
    *,
    field: str | None = None,
    option: str = "--data FILE",
) -> Iterator[Document | Problem]:
    """`read_documents`, with conversations in the dialogue format of the model whose tokenizer is
    in `folder`, on OFFLINE_DATE; where it has none, what was said. Raises DataError, ModelError."""

    @cache
    def text() -> Text | None:
        if not has_tokenizer(folder) or not chat_template(folder):
            return None
        loaded = Text(folder).on(OFFLINE_DATE)
        loaded.check_template()  # or each row would be blamed
        return loaded

    def render(conversation: Conversation) -> Document:
        model = text()
        if model is None:
            return Document(joined(conversation))
        written = model.render(
            conversation.messages, tools=conversation.tools, add_generation_prompt=False
        )
        return Document(written, special=False)

    return read_documents(data, file, field=field, option=option, render=render)


def local_text(section: NamesText) -> Path | None:
    """The file that a section of the recipe reads; None where that is on the hub."""
    path = Path(section.file or bundled.text(section.data) or section.data).expanduser()
    return path if path.is_file() else None
