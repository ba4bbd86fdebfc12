"""Recipes over the tiny model, and `quantflow` run in this process or in one that gets killed."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from quantflow.cli.main import app
from tests.helpers.tiny import write_llama, write_text

STAGES: list[Any] = [
    "calibrate", {"awq": {"grid": 4}}, "gptq", "kv_qparams",
    {"pack": {"format": "compressed-tensors"}}, {"pack": {"format": "awq"}},
    {"pack": {"format": "gptq_v2"}}, {"shard": {"tp": 2}},
]  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """A folder with `model`, `calib.txt`, `eval.txt` and recipes; artifacts go into `out`, with the
    store beside them."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def output(self) -> Path:
        return self.root / "out" / "artifact"

    @property
    def store(self) -> Path:
        return self.root / "out" / ".quantflow-store"

    def evaluate(self, **settings: Any) -> dict[str, Any]:
        return {
            "evaluate": {
                "data": str(self.root / "eval.txt"),
                "windows": 4,
                "length": 32,
                **settings,
            }
        }

    def recipe(self, name: str = "recipe", /, **changes: Any) -> Path:
        """A recipe with every stage, at the top level changed."""
        content = {
            "name": "tiny",
            "model": str(self.model),
            "output": str(self.output),
            "calibration": {"data": str(self.root / "calib.txt"), "samples": 6, "seqlen": 32},
            "weights": {"bits": 4, "group_size": 16},
            "stages": [*copy.deepcopy(STAGES), self.evaluate()],
            **changes,
        }
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def clear(self) -> None:
        """Removes what runs have left."""
        shutil.rmtree(self.root / "out", ignore_errors=True)

    def layers(self) -> dict[str, tuple[int, int]]:
        """Finished layers in the store -> what a rewritten file would not have: the same inode and
        time."""
        files = sorted(self.store.glob("*/layer-*.safetensors"))
        return {
            str(p.relative_to(self.store)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files
        }

    def leavings(self) -> list[str]:
        """What lies beside the output, the store apart; scratch files and saved streams in the
        store."""
        beside = [
            p.name for p in (self.root / "out").glob("*") if p != self.output and p != self.store
        ]
        return sorted(
            beside
            + [
                p.name
                for p in self.store.glob("*/*")
                if p.name.startswith(".") or p.suffix == ".bin"
            ]
        )


def make_bench(root: Path, **config: Any) -> Bench:
    bench = Bench(root)
    write_llama(bench.model, **config)
    write_text(root / "calib.txt", 0, 128)
    write_text(root / "eval.txt", 128, 256)
    return bench


def invoke(*arguments: object, text: str | None = None) -> Result:
    """The command line, in this process; an exception that it does not turn into a message is
    raised. text: what is typed."""
    torch.set_num_threads(1)
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=text)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def blank_pages(patch: pytest.MonkeyPatch) -> None:
    """Drawing a report's pictures takes longer than a tiny recipe does; tests/report draws them."""
    patch.setattr("quantflow.pipeline.run.report_page", lambda report: f"{report['name']}\n")


def reduced(arguments: list[str]) -> list[str]:
    """The arguments of `run`, `plan` or `release` of a recipe that ships or is shown, with a little
    text in place of much: the recipe's stages and formats as they are. Of several recipes, what the
    last one needs changed changes all. Data sets of the hub are read from `./c4.jsonl` and
    `./wikitext2.txt`."""
    recipe = yaml.safe_load(
        Path([text for text in arguments if text.endswith(".yaml")][-1]).read_text()
    )
    named = {text.partition("=")[0] for text in arguments}
    settings: dict[str, dict[str, Any]] = {
        next(iter(stage)): next(iter(stage.values())) or {}
        for stage in recipe["stages"]
        if isinstance(stage, dict)
    }
    names = {*settings, *(stage for stage in recipe["stages"] if isinstance(stage, str))}
    changes: dict[str, object] = {}
    if calibration := recipe.get("calibration"):
        changes |= {"calibration.samples": 4, "calibration.seqlen": 64}
        if (
            "calibration.file" not in named
            and not calibration.get("file")
            and not Path(calibration["data"]).is_file()
        ):
            changes["calibration.file"] = "c4.jsonl"
    if "awq" in names:
        changes |= {"stages.awq.grid": 1, "stages.awq.max_tokens": 64}
    if "gptq" in names:
        changes["stages.gptq.refine"] = 0
    if "evaluate" in names:
        changes |= {"stages.evaluate.windows": 2, "stages.evaluate.length": 64}
        if "stages.evaluate.data" not in named and not Path(settings["evaluate"]["data"]).is_file():
            changes["stages.evaluate.file"] = "wikitext2.txt"
        changes |= {
            f"stages.evaluate.gates.{gate}": 1e-6 if gate == "top1" else 100.0
            for gate in settings["evaluate"].get("gates", {})
        }
    return [
        *arguments,
        *(word for path, value in changes.items() for word in ("--set", f"{path}={value}")),
    ]


UNLIKE = ("run.json", "quantflow.json")
"""What tells an export from a run, and one from another: times, and where it comes from."""


def contents(folder: Path, skip: tuple[str, ...] = ("run.json",)) -> dict[str, bytes]:
    """Relative path -> bytes of every file below a folder, but those named in `skip`."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in skip
    }


# A server process that has imported torch forks a child in milliseconds.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.helpers.runs", "quantflow.pipeline.run"])

_FILE_EVENTS = {
    "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.listdir",
    "os.scandir", "shutil.copyfile",
}  # fmt: skip


@dataclass(frozen=True)
class Strike:
    """`signal` hits the process just before the `number`-th thing it does to a file below the root
    (`event`: the n-th of that kind)."""

    signal: int
    number: int
    event: str = "any"


def start(
    arguments: list[object],
    root: Path,
    *,
    environment: dict[str, str] | None = None,
    strike: Strike | None = None,
) -> Any:
    """`quantflow` in a child process, which leaves `stderr` and `events.json` (kind of file
    operation -> count) below `root`."""
    process = _context.Process(
        target=_child, args=([str(a) for a in arguments], str(root), environment or {}, strike)
    )
    process.start()
    return process


def _child(
    arguments: list[str], root: str, environment: dict[str, str], strike: Strike | None
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    blank_pages(pytest.MonkeyPatch())
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process
    sys.stderr = open(Path(root) / "stderr", "w", buffering=1)  # noqa: SIM115
    counts: Counter[str] = Counter()

    def audit(event: str, details: tuple[Any, ...]) -> None:
        if event in _FILE_EVENTS and str(details[0]).startswith(root):
            counts.update((event, "any"))
            if strike and strike.event in (event, "any") and counts[strike.event] == strike.number:
                os.kill(os.getpid(), strike.signal)

    sys.addaudithook(audit)
    try:
        app(arguments)
    finally:
        (Path(root) / "events.json").write_text(json.dumps(counts))
