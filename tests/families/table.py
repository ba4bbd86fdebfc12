"""`docs/models.md`: what becomes of every model type of the installed transformers.

python -m tests.families.table [TYPE…]: takes a tiny checkpoint of each through the pipeline, and
writes the page anew (`make models-table`), or the rows of these types alone."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quantflow.models.kinds import decoders, no_decoder
from tests.helpers.families import Family, walked

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEADER = ("model type", "class", "pipeline", "engine", "transformers", "K/V", "AWQ", "notes")


def page(families: list[Family]) -> str:
    """The page's text."""
    passed = sum(family.passed for family in families)
    ways = Counter(family.pipeline for family in families)
    others = Counter(
        (kind, name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if (kind := no_decoder(name))
    )
    lines = [
        "# Model types",
        "",
        f"Of the {len(families)} decoders that transformers {transformers.__version__} maps to"
        f" causal language models, **{passed} go through the pipeline**: {ways['table']} by a table"
        f" of QuantFlow's, {ways['hosted']} *hosted*, their layers computed by transformers' own"
        " class. Each row is a run: a tiny random checkpoint from the type's own config class went"
        " through `calibrate`, `awq`, `gptq`, `kv_qparams` and `pack` as compressed-tensors, every"
        " tensor of it was accounted for, and the artifact's logits in transformers were held"
        " against our own over the same numbers. The page is made by `make models-table`;"
        " `make models` walks all of it again.",
        "",
        "*pipeline*: by a table, hosted, or no. *engine*: whether QuantFlow's own engine runs it;"
        " what it does not, transformers and vLLM may. *transformers*: whether the artifact loads"
        " there and computes the same. *K/V*: of how many layers of the tiny checkpoint K and V had"
        " parameters for an int8 cache. *AWQ*: of how many groups of linears a scale can be folded"
        " away.",
        "",
        _row(HEADER),
        _row(("---",) * len(HEADER)),
        *(_row(family.cells) for family in families),
        "",
        "## No decoders",
        "transformers maps these to causal language models as well. They are refused by name.",
        "",
    ]
    for kind in dict.fromkeys(kind for kind, _ in others):
        names = ", ".join(f"`{name}`" for other, name in others if other == kind)
        lines.append(f"- {kind}: {names}")
    return "\n".join(lines) + "\n"


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def rows(text: str) -> dict[str, str]:
    """Model type -> its line of the page."""
    lines = text.partition(f"{_row(HEADER)}\n")[2].partition("\n\n")[0].splitlines()[1:]
    return {line.split("`")[1]: line for line in lines}


def row(model_type: str, root: Path) -> str:
    """The line of a model type, by a run."""
    return _row(_family(model_type, root).cells)


def _family(model_type: str, root: Path) -> Family:
    try:
        return walked(model_type, root)
    except Exception as error:  # none of the product's: the row says so
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
        note = f"a fault of QuantFlow's: {error!r}"[:200].strip()
        return Family(model_type, name, "no", note=note)


def _walked(model_type: str) -> Family:
    warnings.simplefilter("ignore")  # what classes warn of is theirs
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return _family(model_type, Path(folder))


def _all(names: Iterable[str]) -> Iterator[Family]:
    names, spawned = list(names), get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawned) as pool:
        for number, family in enumerate(pool.map(_walked, names), 1):
            print(f"{number} of {len(names)}: {_row(family.cells)}", file=sys.stderr, flush=True)
            yield family


def main(chosen: list[str]) -> None:
    """Writes the page anew, or the rows of some model types alone."""
    kept = rows(PAGE.read_text(encoding="utf-8")) if chosen else {}
    families = {name: _read(line) for name, line in kept.items()}
    families |= {family.model_type: family for family in _all(chosen or decoders())}
    PAGE.write_text(page([families[name] for name in decoders()]), encoding="utf-8")


def _read(line: str) -> Family:
    model_type, *cells = (cell.strip() for cell in line.strip("|").split("|"))
    return Family(model_type.strip("`"), *cells)


if __name__ == "__main__":
    main(sys.argv[1:])
