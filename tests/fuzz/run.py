"""Coverage-guided fuzzing of every target, a bounded time each, with atheris (libFuzzer for
Python).

    make fuzz [TARGET=gguf] [FUZZ_SECONDS=600] PYTHONPATH=.:kernels python tests/fuzz/run.py [TARGET
    …] [--seconds 600] [--record benchmarks/results/fuzz_cpu.json]

A target's seeds and what was found interesting are kept in build/fuzz/TARGET/corpus, from where the
next run goes on; inputs that go wrong in build/fuzz/TARGET/findings, one a way, each beside a text
that says how. A finding does not end the run; a hang or a crash does end the process, and another
goes on for the time that is left. Exit status 1: there were findings.

The record has, for each target, the executions, the edges of Python code that libFuzzer counted,
and how many of the branches of the parser's own files the corpus takes, as coverage.py counts them
in one more pass without libFuzzer.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LONGEST_INPUT = 2**16  # bytes
# on a clock, which other work on the machine slows; and in all, torch included
HANG_SECONDS, MOST_MEMORY_MB = 120, 3072
# for inputs that are written and read thousands of times
IN_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
LATE = 900  # seconds that a process is given to start and to end, on a machine that has other work
MOST_PROCESSES = 50  # for one target
BROKEN = 3  # the exit status of a process whose harness failed


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Ends the process at an exception of the harness's own, which libFuzzer would neither show nor
    survive."""
    try:
        yield
    except Exception:
        (folder / "broken").write_text(traceback.format_exc())
        os._exit(BROKEN)


def _fuzz(name: str, folder: Path, seconds: int, seed: int) -> None:
    """libFuzzer in this process, which it ends."""
    import atheris

    with atheris.instrument_imports(include=["quantflow", "yaml", "configparser"]):
        from tests.fuzz.targets import TARGETS, judge, quiet
    from tests.fuzz.mutation import flip, mutated

    target, donors = (
        TARGETS[name],
        [path.read_bytes() for path in sorted((folder / "seeds").iterdir())],
    )
    quiet()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    known: set[str] = set()

    def plain(data: bytes, rng: Random) -> bytes:
        return (
            bytes(atheris.Mutate(data, len(data) + 64))
            if data and rng.random() < 0.5
            else flip(data, rng)
        )

    def mutate(data: bytes, longest: int, number: int) -> bytes:
        with _told(folder):
            return mutated(data, Random(number), target.files, donors, plain)[:longest]

    with TemporaryDirectory(dir=IN_MEMORY) as place:

        def one(data: bytes) -> None:
            with _told(folder):
                finding = judge(target, data, Path(place))
                if finding is not None and finding.name not in known:
                    known.add(finding.name)
                    stem = folder / "findings" / _digest(finding.name.encode())
                    stem.with_suffix(".input").write_bytes(data)
                    stem.with_suffix(".txt").write_text(
                        f"{finding.name}\n\n{finding.text}",
                        encoding="utf-8",
                        errors="backslashreplace",
                    )

        options = [
            f"-max_total_time={seconds}",
            f"-timeout={HANG_SECONDS}",
            f"-report_slow_units={HANG_SECONDS}",
            f"-max_len={LONGEST_INPUT}",
            f"-rss_limit_mb={MOST_MEMORY_MB}",
            f"-artifact_prefix={folder / 'findings'}/",
            f"-seed={seed}",
            "-len_control=0",
            "-print_final_stats=1",
            "-close_fd_mask=3",
        ]
        (folder / "began").write_text(str(time.monotonic()))
        atheris.Setup(
            [sys.argv[0], *options, str(folder / "corpus"), str(folder / "seeds")],
            one,
            custom_mutator=mutate,
        )
        atheris.Fuzz()


def _branches(name: str, folder: Path) -> None:
    """Prints how many branches of the target's files its corpus takes, and of how many."""
    import coverage

    counter = coverage.Coverage(
        data_file=None, branch=True, source=[str(ROOT / "quantflow")], config_file=False
    )
    counter.start()  # before the target's imports, whose branches count too
    from tests.fuzz.targets import TARGETS, judge, quiet

    quiet()
    with TemporaryDirectory(dir=IN_MEMORY) as place:
        for path in sorted([*(folder / "corpus").iterdir(), *(folder / "seeds").iterdir()]):
            judge(TARGETS[name], path.read_bytes(), Path(place))
    counter.stop()
    with TemporaryDirectory() as place:
        counter.json_report(
            outfile=f"{place}/report.json",
            include=[str(ROOT / "quantflow" / part) for part in TARGETS[name].covers],
        )
        totals = json.loads(Path(place, "report.json").read_text())["totals"]
    print(json.dumps({"taken": totals["covered_branches"], "of": totals["num_branches"]}))


def _number(pattern: str, log: str) -> int:
    """The last number that the pattern finds."""
    found = re.findall(pattern, log)
    return int(found[-1]) if found else 0


def _findings(folder: Path) -> list[Path]:
    """The inputs that went wrong."""
    return sorted(path for path in (folder / "findings").iterdir() if path.suffix != ".txt")


def _run(name: str, build: Path, seconds: int) -> dict[str, Any]:
    """A target's time, in as many processes as it takes; what goes into the record."""
    from tests.fuzz.seeds import seeds

    folder = build / name
    for part in ("seeds", "corpus", "findings"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for old in (*(folder / "seeds").iterdir(), *(folder / "findings").iterdir()):
        old.unlink()
    for data in seeds(name):
        (folder / "seeds" / _digest(data)).write_bytes(data)
    me = [sys.executable, str(Path(__file__)), name, "--build", str(build)]
    executions, edges, processes, spent = 0, 0, 0, 0.0  # time counts from where imports are done
    while (left := round(seconds - spent)) > 0 and processes < MOST_PROCESSES:
        processes += 1
        log = folder / "log"
        with open(log, "wb") as file:
            done = subprocess.run(
                [*me, "--child", "--seconds", str(left), "--seed", str(processes)],
                cwd=ROOT,
                stderr=file,
                stdout=file,
                timeout=left + HANG_SECONDS + LATE,
            )
        text = log.read_text(errors="replace")
        if done.returncode == BROKEN:
            raise SystemExit(f"{name}: {(folder / 'broken').read_text()}")
        if not _number(r"number_of_executed_units: (\d+)", text):
            raise SystemExit(f"{name}: the fuzzer ended with {done.returncode}:\n{text[-4000:]}")
        spent += time.monotonic() - float((folder / "began").read_text())
        executions += _number(r"number_of_executed_units: (\d+)", text)
        edges = max(edges, _number(r"cov: (\d+)", text))
        if done.returncode == 0:
            break
    counted = subprocess.run(
        [*me, "--branches"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    seeded, kept = (len(list((folder / part).iterdir())) for part in ("seeds", "corpus"))
    return {
        "seconds": round(spent),
        "executions": executions,
        "edges": edges,
        "branches": json.loads(counted.splitlines()[-1]),
        "seeds": seeded,
        "corpus": kept,
        "findings": len(_findings(folder)),
    }


def _commit() -> str:
    """Of the code; with a + where it differs from that."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + (
        "+" if git("status", "--porcelain", "--", "quantflow", "tests/fuzz") else ""
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all, where none is named")
    parser.add_argument("--seconds", type=int, default=600, help="for each target")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "fuzz")
    parser.add_argument("--record", type=Path, help="a JSON file that takes each target's numbers")
    for hidden in ("--child", "--branches"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if arguments.child:
        _fuzz(
            arguments.targets[0],
            arguments.build / arguments.targets[0],
            arguments.seconds,
            arguments.seed,
        )
        return 0
    if arguments.branches:
        _branches(arguments.targets[0], arguments.build / arguments.targets[0])
        return 0

    from quantflow.machine import processor
    from tests.fuzz.targets import TARGETS

    if unknown := set(arguments.targets) - set(TARGETS):
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    versions = {
        name: importlib.metadata.version(name) for name in ("atheris", "tokenizers", "torch")
    }
    bad = 0
    for name in arguments.targets or TARGETS:
        commit = _commit()
        row = _run(name, arguments.build.resolve(), arguments.seconds)
        row |= {
            "commit": commit,
            "date": date.today().isoformat(),
            "python": sys.version.split()[0],
            **versions,
            "device": processor(),
        }
        share = "{taken} of {of} branches".format(**row["branches"])
        print(
            f"{name}: {row['seconds']} s, {row['executions']} executions, {row['edges']} edges,"
            f" {share}, {row['corpus']} in the corpus, {row['findings']} findings",
            flush=True,
        )
        for path in _findings(arguments.build / name):
            text = path.with_suffix(".txt")  # of what ended the process there is none
            print(
                f"  {path}" + (f": {text.read_text().splitlines()[0]}" if text.is_file() else ""),
                flush=True,
            )
        bad += row["findings"]
        if arguments.record:
            rows = (
                json.loads(arguments.record.read_text())["targets"]
                if arguments.record.is_file()
                else {}
            )
            arguments.record.write_text(
                json.dumps({"targets": {**rows, name: row}}, indent=1) + "\n"
            )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
