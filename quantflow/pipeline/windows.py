"""The token windows that a section of the recipe names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantflow.calibration.data import Windows, cut_windows
from quantflow.errors import Problem, UserError
from quantflow.pipeline.plan import Plan
from quantflow.pipeline.texts import model_documents


def left_out_notes(**sections: Windows | None) -> list[str]:
    """What of the sections' texts could not be used, each in a sentence."""
    return [
        f"{name}: {windows.left_out.note}"
        for name, windows in sections.items()
        if windows and windows.left_out
    ]


def recipe_windows(plan: Plan, tokenizer: Any, name: str) -> Windows:
    """The windows of one of the plan's `sections`. Raises DataError, and UserError for a tokenizer
    that is another model's."""
    section = plan.sections[name]
    path = name if name == "calibration" else f"stages.{name}"
    option = f"--set {path}.file=FILE"
    documents = model_documents(
        plan.checkpoint.tokenizer_path,
        section.data,
        section.file,
        field=section.field,
        option=option,
    )
    windows = cut_windows(
        tokenizer,
        documents,
        count=section.count,
        length=section.tokens,
        skip=section.skip,
        source=Path(section.file or section.data).name,
    )
    largest = max(map(max, windows.tokens))
    if largest >= plan.config.vocabulary:
        raise UserError(
            Problem(
                f"{plan.checkpoint.path} tokenizer",
                f"gives token {largest}",
                f"ids below the model's vocabulary of {plan.config.vocabulary}",
                "Tokenizer and weights are not of one model",
            )
        )
    return windows
