"""Where an artifact goes, and what stands against that."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from quantflow.artifacts.artifact import RUN, foreign_files, is_export, read_manifest
from quantflow.checkpoints.directory import read_json
from quantflow.errors import OutputError, Problem, UserError

if TYPE_CHECKING:
    from quantflow.pipeline.plan import Plan


def output_problems(plan: Plan) -> list[Problem]:
    try:
        return _place_problems(plan, plan.output.resolve(), plan.checkpoint.path.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, a loop of links, a NUL
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        return [
            Problem(
                str(plan.output),
                reason,
                "a directory that QuantFlow may create",
                "Pass --output DIR",
            )
        ]


def _place_problems(plan: Plan, output: Path, model: Path) -> list[Problem]:
    def wrong(found: str, expected: str, hint: str = "Pass --output DIR") -> list[Problem]:
        return [Problem(str(plan.output), found, expected, hint)]

    # What would be lost is no artifact of this recipe's.
    if output == model or model in output.parents:
        return wrong("lies in the model directory", "another place")
    if output in model.parents:
        return wrong("contains the model directory and would replace it", "another place")
    if output.exists() and not output.is_dir():
        return wrong("a file", "a directory that QuantFlow may create", "")
    if output.is_dir() and any(output.iterdir()) and not (output / "quantflow.json").is_file():
        return wrong(
            "a directory with other content",
            "an empty or absent one, or an artifact of QuantFlow's",
        )
    if is_export(output):
        return wrong("what `quantflow export` wrote, which would be lost", "another place")
    if "output" not in plan.recipe.model_fields_set and (other := _other_model(plan, output)):
        return wrong(
            f"an artifact of another model, {other}, which would be lost",
            f"one of {plan.recipe.model}, or nothing",
        )
    if foreign := foreign_files(output):
        shown = ", ".join(foreign[:3]) + (
            f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        )
        return wrong(
            f"an artifact with other files in it ({shown}), which would be lost",
            "only the artifact",
            "Move them away",
        )
    # Nothing could be written there.
    if plan.store.root.exists() and not plan.store.root.is_dir():
        store, hint = str(plan.store.root), "Set QUANTFLOW_STORE to a directory"
        return [Problem(store, "a file", "a directory for the store", hint)]
    parent = output
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        return wrong(f"{parent} is not writable", "a writable place")
    return []


def _other_model(plan: Plan, output: Path) -> str:
    """The model that the artifact at `output` was made of, if that is another than the plan's; else
    ""."""
    try:
        manifest, record = (
            read_manifest(output),
            read_json(output / RUN) if (output / RUN).is_file() else {},
        )
        digests = plan.store.cached_digests(plan.checkpoint.files)
    except (OSError, UserError):  # which the run replaces
        return ""
    if manifest is None or (
        digests and manifest["source"]["weights"] == plan.weights_key(digests.values())
    ):
        return ""
    # the names of two places may be one
    name, place = manifest["source"]["model"], record.get("model")
    if isinstance(place, str):
        return place if place != plan.model_place else ""
    return (
        name if name != (Path(plan.model).name if Path(plan.model).exists() else plan.model) else ""
    )


def check_output(plan: Plan) -> None:
    """Raises OutputError where the output or the store cannot be written."""
    for folder in (plan.output.absolute().parent, plan.store.root):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".quantflow-probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OutputError(
                Problem(
                    str(folder),
                    error.strerror or str(error),
                    "a writable directory",
                    "Pass --output DIR",
                )
            ) from error
