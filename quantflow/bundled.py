"""What comes with QuantFlow: recipes, two texts, and a small model. In a source tree they lie
beside the package, and installed in it."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
BUNDLED, BUNDLED_NEW = "demo", "demo-new"  # the texts to calibrate and to evaluate on
BUNDLED_TEXT = "the bundled text, pages of the documentation of Python, PostgreSQL and SQLite"
TEXTS = {BUNDLED: "demo_calib.txt", BUNDLED_NEW: "demo_eval.txt"}


def folder() -> Path:
    """The folder that holds `recipes` and `calib_data`."""
    inside = _PACKAGE / "share"  # where setup.py puts them
    return inside if inside.is_dir() else _PACKAGE.parent


def text(name: str) -> Path | None:
    """The bundled text of that name (`demo`; `demo-new`, other pages); None for any other name."""
    return folder() / "calib_data" / TEXTS[name] if name in TEXTS else None


def recipes() -> list[str]:
    """The names of the bundled recipes, sorted."""
    return sorted(path.stem for path in (folder() / "recipes").glob("*.yaml"))


def recipe(name: str | Path) -> Path | None:
    """The bundled recipe that `w4`, `w4.yaml` or `recipes/w4.yaml` names; None for any other
    name."""
    path = Path(name)
    known = (
        path.parent in (Path(), Path("recipes"))
        and path.suffix in ("", ".yaml")
        and path.stem in recipes()
    )
    return folder() / "recipes" / f"{path.stem}.yaml" if known else None


def find(name: str | Path) -> Path:
    """The file itself, `NAME.yaml` for `NAME`, or the bundled recipe of that name. What is none of
    them stays as it is, for whoever reads it to say so."""
    path = Path(name)
    try:
        if path.exists():
            return path
        if not path.suffix and (local := path.with_suffix(".yaml")).is_file():
            return local
    except (OSError, ValueError):  # too long a name, a NUL
        return path
    return recipe(path) or path
