"""What QuantFlow is called where packages are installed from: the import and the command are
`quantflow`, which on the package registry is another project's name."""

from __future__ import annotations

from importlib.metadata import distributions

from quantflow.errors import Problem

NAME = "quantflow-llm"


def missing(where: str, package: str, extra: str) -> Problem:
    """That a package of one of our extras is not there."""
    return Problem(
        where, f"the package {package} is not installed", hint=f"pip install '{NAME}[{extra}]'"
    )


def shared() -> str:
    """What else has its files in our package's folder, as one line; "" for nothing."""
    for other in distributions(name="quantflow"):
        if "quantflow/__init__.py" in map(str, other.files or ()):
            return (
                f"quantflow {other.version}, another project, is installed into the same folder;"
                f" expected {NAME} alone, which uninstalling the other would break"
            )
    return ""
