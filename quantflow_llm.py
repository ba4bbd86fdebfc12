"""The command `quantflow`, after a look at whose package of that name is there.

The package registry's `quantflow` is another project, with the same import name: where both are
installed they share a folder, and either may have the last word in it. So this module lies outside
of that folder, and first looks without importing anything of it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

NAME = "quantflow-llm"
REMEDY = f"Run `pip uninstall quantflow {NAME}` and install {NAME} again"


def shadowed(package: Path | None = None) -> str:
    """What stands in the place of our package, as one line; "" where it is ours.

    Args:
        package: Its `__init__.py`; by default the one that `import quantflow` would take.
    """
    if package is None:
        spec = importlib.util.find_spec("quantflow")
        package = Path(spec.origin) if spec and spec.origin else None
    if package is None:
        return f"no package of that name is found; expected that of {NAME}. {REMEDY}"
    try:
        ours = NAME in package.read_text(encoding="utf-8", errors="replace")  # in our docstring
    except OSError:  # in an archive, say
        ours = False
    if ours:
        return ""
    return f"{package} is of another project of that name; expected that of {NAME}. {REMEDY}"


def main() -> None:
    """The command line; or one line that says why there is none, and exit code 2."""
    if problem := shadowed():
        print(f"quantflow: {problem}", file=sys.stderr)
        sys.exit(2)
    from quantflow.cli.main import main as command
    from quantflow.distribution import shared

    if problem := shared():
        print(f"quantflow: warning: {problem}. {REMEDY}", file=sys.stderr)
    command()


if __name__ == "__main__":
    main()
