"""`quantflow eval --tasks`: questions with right answers, one model or two."""

from __future__ import annotations

import gc
import json
import operator
import time
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from quantflow import __version__
from quantflow.cli.console import console, progress
from quantflow.errors import OutputError, Problem, UserError

if TYPE_CHECKING:
    from quantflow.evaluate.significance import Paired
    from quantflow.evaluate.tasks import Result, Settings, Task

SHOWN = {"acc": "", "acc_norm": "normalised"}  # the metrics of the table, and of the paired test


def spelled(text: str) -> str:
    """A delimiter or stop string as it is typed in a shell: \\n is a new line, \\t a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def settings_of(
    files: list[str],
    delimiters: list[str],
    few_shot: int,
    limit: int | None,
    stop: list[str],
    most: int,
) -> list[Settings]:
    """One a file. Raises UserError."""
    from quantflow.evaluate.tasks import Settings

    if len(delimiters) not in (0, 1, len(files)):
        raise UserError(
            Problem(
                "--delimiter",
                f"{len(delimiters)} of them",
                f"one, or {len(files)}: one a file, in their order",
            )
        )
    each = (delimiters or [" "]) * (1 if len(delimiters) > 1 else len(files))
    stops = tuple(spelled(s) for s in stop) or ("\n",)
    return [Settings(spelled(d), few_shot, limit, stops, most) for d in each]


def evaluate_tasks(
    model: str,
    reference: str | None,
    files: list[str],
    settings: list[Settings],
    *,
    batch: int,
    kv: str,
    mode: str,
    device: str,
    output: Path | None,
    as_json: bool,
) -> None:
    """Answers every task with the model, then with the reference, one in memory at a time, and
    shows both.

    JSON: quantflow (its version), model, reference, mode, kv, and how they ran (`engine`,
    `reference_engine`); `tasks`: by name, file, sha256, form, count, chance, settings, and `model`
    and `reference`: acc, acc_norm, acc_bytes (value, interval of 95%), tokens, cut (questions whose
    context lost its beginning), seconds, in the file of --output also items; `paired`, where there
    is a reference: by metric, difference, interval, losses, gains, p, verdict; `all`: by form, the
    same over all questions of that form, since the metrics of two forms are not the same thing. In
    the file of --output also the date, and `weights`, `reference_weights`: sha256 of each weight
    file and the config.
    """
    from quantflow.artifacts.store import write_json
    from quantflow.evaluate.tasks import read_tasks

    # Everything that can be wrong, before a model is loaded.
    tasks = read_tasks(files, settings)
    if output:  # reported before the work, not after it
        if output.is_dir():
            raise OutputError(Problem(f"--output {output}", "a directory", "a file"))
        output.parent.mkdir(parents=True, exist_ok=True)
    _check_models([model, *([reference] if reference else [])])
    # The answers of the model, then of the reference.
    with progress() as watcher:
        watcher.phase("tasks", sum(len(task.items) for task in tasks) * (2 if reference else 1))
        results, ran = _answers(model, tasks, batch, kv, mode, device, watcher)
        # The reference runs as it is: --kv is what is tried on the model.
        others, other_ran = (
            _answers(reference, tasks, batch, "auto", mode, device, watcher)
            if reference
            else ([], None)
        )
    # The record, for --output and --json.
    record = _record(results, others)
    record = {
        "quantflow": __version__, "model": model, "reference": reference, "mode": mode, "kv": kv,
        "engine": ran, "reference_engine": other_ran, **record,
    }  # fmt: skip
    if output:
        digests = {
            "weights": _digests(model),
            "reference_weights": _digests(reference) if reference else None,
        }
        items = _record(results, others, items=True)["tasks"]
        write_json(output, {**record, "date": time.strftime("%Y-%m-%d"), **digests, "tasks": items})
    if as_json:
        print(json.dumps(record))
        return
    # The same as tables.
    console.print(_scores(record))
    for result in results:
        tokens, cut = sum(a.tokens for a in result.answers), sum(a.cut for a in result.answers)
        text = (
            f"{result.task.name}: {tokens} tokens of answers,"
            f" {result.count / max(result.seconds, 1e-9):.1f} questions a second"
        )
        console.print(
            text
            + (
                f"; {cut} longer than the model's context: their beginning was left out"
                if cut
                else ""
            )
        )
    if others:
        console.print(_pairs(record))
        for name, entry in _entries(record):
            for metric, shown in SHOWN.items():
                console.print(
                    f"{name}{f', {shown}' if shown else ''}: {entry['paired'][metric]['verdict']}"
                )


def _check_models(models: list[str]) -> None:
    """Raises UserError with what is wrong with any of the models, as far as headers and tokenizers
    say: the second is loaded only when the first has answered everything."""
    from quantflow.checkpoints.checkpoint import resolve_model
    from quantflow.engine.text import Text
    from quantflow.formats.reader import Weights
    from quantflow.tokenizers.load import has_tokenizer

    problems: list[Problem] = []
    for model in models:
        try:
            checkpoint = Weights(resolve_model(model)).checkpoint
            if has_tokenizer(checkpoint.tokenizer_path):
                Text(checkpoint.tokenizer_path)
            else:
                problems.append(
                    Problem(
                        model,
                        "no tokenizer",
                        "tokenizer.json, tokenizer.model, vocab.json or qwen.tiktoken",
                    )
                )
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)


def _answers(
    path: str, tasks: list[Task], batch: int, kv: str, mode: str, device: str, watcher: Any
) -> tuple[list[Result], dict[str, str]]:
    import torch

    from quantflow.engine.config import EngineConfig, KVPrecision, Mode
    from quantflow.engine.engine import Engine
    from quantflow.evaluate.tasks import answer
    from quantflow.machine import resolve_device

    # Small blocks: the choices of a question share its context in whole blocks.
    options = EngineConfig(
        mode=Mode(mode),
        device=resolve_device(device),
        kv=KVPrecision(kv),
        max_batch_size=batch,
        block_size=16,
    )
    engine = Engine(path, options)
    results = [answer(engine, task, batch, watcher.step) for task in tasks]
    described = engine.describe()
    engine.close()
    del engine
    gc.collect()  # before another model is loaded, whose cache takes a share of what is free
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return results, described


def _digests(model: str) -> dict[str, str]:
    """sha256 of what a model computes with: its config and the files of its weights, by name."""
    from quantflow.artifacts.fingerprint import file_digest
    from quantflow.checkpoints.checkpoint import resolve_model
    from quantflow.formats.reader import Weights

    checkpoint = Weights(resolve_model(model)).checkpoint
    config = checkpoint.path / "config.json"
    return {
        file.name: file_digest(file)
        for file in sorted({*checkpoint.files, *([config] if config.is_file() else [])})
    }


def _record(results: list[Result], others: list[Result], *, items: bool = False) -> dict[str, Any]:
    from quantflow.evaluate.significance import wilson_interval
    from quantflow.evaluate.tasks import compare

    tasks: dict[str, Any] = {}
    by_form: dict[str, list[int]] = {}
    pairs: list[dict[str, Paired]] = []
    for i, result in enumerate(results):
        task, own = result.task, result.task.settings
        entry: dict[str, Any] = {
            "file": task.path,
            "sha256": task.sha256,
            "form": task.form,
            "count": result.count,
            "chance": task.chance,
            "settings": {
                "delimiter": own.delimiter,
                "few_shot": own.few_shot,
                "stop": list(own.stop),
                "max_tokens": own.max_tokens,
            },
            "model": result.as_dict(items=items),
        }
        if others:
            pairs.append({metric: compare(result, others[i], metric) for metric in SHOWN})
            entry |= {
                "reference": others[i].as_dict(items=items),
                "paired": {metric: p.as_dict() for metric, p in pairs[i].items()},
            }
        tasks[task.name] = entry
        by_form.setdefault(task.form, []).append(i)

    def over_all(results: list[Result]) -> dict[str, Any]:
        scores: dict[str, Any] = {}
        for metric in SHOWN:
            right = [one for result in results for one in result.right(metric)]
            interval = wilson_interval(sum(right), len(right))
            scores[metric] = {
                "value": sum(right) / len(right),
                "interval": [interval.low, interval.high],
            }
        return scores

    together: dict[str, Any] = {}
    for form, places in by_form.items():
        together[form] = {
            "count": sum(results[i].count for i in places),
            "model": over_all([results[i] for i in places]),
        }
        if others:
            pooled = {
                m: reduce(operator.add, (pairs[i][m] for i in places)).as_dict() for m in SHOWN
            }
            together[form] |= {"reference": over_all([others[i] for i in places]), "paired": pooled}
    return {"tasks": tasks, "all": together}


def _scores(record: dict[str, Any]) -> Table:
    """A row a task and model."""
    table = _table(
        "Right answers in percent, and intervals of 95%",
        "task",
        "n",
        "chance",
        "model",
        "plain",
        "normalised",
        left=(0, 3),
    )
    for name, entry in _entries(record):
        chance = entry.get("chance")
        own = [name, str(entry["count"]), "" if chance is None else f"{chance * 100:.1f}"]
        for which in ("model", "reference"):
            if which in entry:
                table.add_row(
                    *own,
                    Path(record[which]).name,
                    *(_percent(entry[which][metric]) for metric in SHOWN),
                )
                own = ["", "", ""]
    return table


def _pairs(record: dict[str, Any]) -> Table:
    """A row a task and metric."""
    title = f"{Path(record['model']).name} less {Path(record['reference']).name}, in points"
    table = _table(title, "task", "", "difference", "lost", "gained", "p", left=(0, 1))
    for name, entry in _entries(record):
        for metric, shown in SHOWN.items():
            pair = entry["paired"][metric]
            change = _percent({"value": pair["difference"], "interval": pair["interval"]}, "+")
            table.add_row(
                "" if shown else name,
                shown or "plain",
                change,
                str(pair["losses"]),
                str(pair["gains"]),
                f"{pair['p']:.2g}",
            )
    return table


def _entries(record: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every task, and each form that several tasks have, taken together."""
    tasks, forms = record["tasks"], record["all"]
    many = [form for form in forms if sum(task["form"] == form for task in tasks.values()) > 1]
    return [
        *tasks.items(),
        *(("all" if len(forms) == 1 else f"all {form}", forms[form]) for form in many),
    ]


def _table(title: str, *names: str, left: tuple[int, ...]) -> Table:
    table = Table(*names, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    for i, column in enumerate(table.columns):
        column.justify, column.no_wrap = ("left" if i in left else "right"), i > 3
    return table


def _percent(share: dict[str, Any], sign: str = "") -> str:
    low, high = (f"{end * 100:{sign}.1f}" for end in share["interval"])
    return f"{share['value'] * 100:{sign}.1f} ({low}, {high})"
