"""The documents of a data set as a model sees them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from quantflow import bundled
from quantflow.calibration.data import Rendered, documents, joined
from quantflow.calibration.shapes import Dialogue
from quantflow.engine.text import Text
from quantflow.models.tokenizer import chat_template, has_tokenizer
from quantflow.recipe import Calibration, Evaluate


def model_documents(
    folder: Path, data: str, file: str | None = None, *, field: str | None = None, option: str = "--data FILE"
) -> Iterator[str]:
    """`documents`, with dialogues in the format of the model whose tokenizer is in `folder`; where it has none, what was said. Raises
    DataError, ModelError."""

    @cache
    def text() -> Text | None:
        return Text(folder) if has_tokenizer(folder) and chat_template(folder) else None

    def render(dialogue: Dialogue) -> str:
        model = text()
        if model is None:
            return joined(dialogue)
        return Rendered(model.render(dialogue.messages, tools=dialogue.tools, add_generation_prompt=False))

    return documents(data, file, field=field, option=option, render=render)


def local_text(section: Calibration | Evaluate) -> Path | None:
    """The file that a section of the recipe reads; None where that is on the hub."""
    path = Path(section.file or bundled.text(section.data) or section.data).expanduser()
    return path if path.is_file() else None
