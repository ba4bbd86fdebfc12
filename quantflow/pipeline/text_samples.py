"""How the texts begin that a recipe names, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from quantflow.calibration.data import LeftOut
from quantflow.errors import Problem, UserError
from quantflow.pipeline.texts import local_text, model_documents
from quantflow.recipe import NamesText

if TYPE_CHECKING:
    from quantflow.pipeline.plan import Plan

SAMPLE, LOOKED = 200, 16  # letters of a text that are shown, and documents that are looked at


@dataclass(frozen=True)
class Sample:
    """begins: how the first document of a text does, as the model will see it; "" where there is
    none. left_out: what of the first rows cannot be used; "" where all can."""

    begins: str
    left_out: str


def sample_of(folder: Path, section: NamesText) -> Sample | UserError:
    """How the text begins to the model whose tokenizer is in `folder`, or why it cannot be read."""
    documents = model_documents(folder, section.data, section.file, field=section.field)
    left_out = LeftOut()
    try:
        first = list(islice(left_out.sift(documents), section.skip, section.skip + LOOKED))
        if not first:
            left_out.check()
        return Sample(first[0].text[:SAMPLE] if first else "", left_out.note)
    except UserError as error:
        return error


def text_problems(plan: Plan) -> list[Problem]:
    problems = []
    for where, section in plan.sections.items():
        read = plan.reads_calibration or where != "calibration"
        if read and section.tokens > plan.config.context and not plan.config.stretches:
            problems.append(
                Problem(
                    where,
                    f"windows of {section.tokens} tokens",
                    f"at most the model's {plan.config.context} positions",
                )
            )
        sample = plan.samples.get(where)
        if isinstance(sample, UserError):
            problems += [problem for problem in sample.problems if problem not in problems]
        elif sample and not sample.begins:
            problem = (
                "no text in it"
                if not section.skip
                else f"no text in it after {section.skip} documents"
            )
            problems.append(Problem(f"{where} {local_text(section)}", problem, "documents"))
    return problems
