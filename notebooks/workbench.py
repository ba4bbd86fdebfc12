"""What every notebook begins with: a temporary folder, the bundled model and texts in it, and
`%quantflow`, the command line."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.core.getipython import get_ipython

_ROOT = Path(__file__).resolve().parents[1]
_folder = tempfile.TemporaryDirectory(prefix="quantflow-notebook-")  # removed when the kernel ends


def enter() -> None:
    """Makes the temporary folder the current one, with `calib_data` in it, and defines the magic
    `%quantflow`.

    `%quantflow run first.yaml` is `quantflow run first.yaml` in a terminal, without the lines of
    progress. A command that fails is an error; `%quantflow [3] run first.yaml` is one if the exit
    code is not 3.
    """
    os.chdir(_folder.name)
    Path("calib_data").symlink_to(_ROOT / "calib_data")
    shell = get_ipython()
    assert shell is not None
    shell.register_magic_function(_quantflow, magic_kind="line", magic_name="quantflow")
    plt.rcParams.update(
        {
            "figure.figsize": (8, 2.8),
            "figure.dpi": 80,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.alpha": 0.3,
            "font.size": 9,
            "legend.frameon": False,
        }
    )


def _quantflow(line: str) -> None:
    words = shlex.split(line)
    expected = int(words.pop(0).strip("[]")) if words and words[0].startswith("[") else 0
    # In a pipe there are no colours; the width is that of a notebook's cell.
    environment = {k: v for k, v in os.environ.items() if "COLOR" not in k} | {"COLUMNS": "110"}
    done = subprocess.run(
        [sys.executable, "-m", "quantflow.cli.main", *words],
        capture_output=True,
        text=True,
        env=environment,
    )
    print(done.stdout, end="")
    if expected or done.returncode:
        lines = done.stderr.splitlines()
        begin = next(
            (number for number, text in enumerate(lines) if text.startswith("quantflow: ")), 0
        )
        print("\n".join(lines[begin:]))
    if done.returncode != expected:
        raise RuntimeError(f"quantflow {line} ended with {done.returncode}")
