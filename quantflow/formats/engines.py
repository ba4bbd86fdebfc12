"""What engines load of each format: one table, from which come the `doubts` of the formats, what
`quantflow init` offers, what `quantflow formats` says, and the table of docs/engines.md.

A checkpoint can be right in itself and an engine still not load it. An engine is named with the
version that was read or run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from quantflow.errors import Problem
from quantflow.formats.naming import FUSED

if TYPE_CHECKING:
    from quantflow.quant.scheme import Scheme

VLLM, SGLANG, LMDEPLOY, TRANSFORMERS = (
    "vLLM 0.32",
    "SGLang",
    "LMDeploy 0.18 (TurboMind)",
    "transformers 5.23",
)
GPTQMODEL, AUTOGPTQ, AUTOAWQ, BITSANDBYTES = "GPTQModel 7.7", "AutoGPTQ", "AutoAWQ", "bitsandbytes"
LLAMA_CPP, OLD_LMDEPLOY = "llama.cpp", "LMDeploy 0.1"

Known = Literal["run", "read", "reported"]


@dataclass(frozen=True)
class Loads:
    """What an engine loads of a format; a pair may have several, and without one nothing is known
    of it.

    bits: none where it loads nothing. groups: input channels that share a scale, -1 for the whole
    row; empty for any. asymmetric: zero points too. index: a group index too. only: what it takes,
    where that is not always there. known: `run`, a checkpoint of ours was loaded and its numbers
    held against ours; `read`, in its code; `reported`, by its documentation or its users.
    kinds: of numbers, by their names in `NUMBERS`; empty for any.
    """

    engine: str
    format: str
    bits: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    asymmetric: bool = False
    index: bool = False
    known: Known = "reported"
    only: str = ""
    note: str = ""
    kinds: tuple[str, ...] = ("integer",)

    def holds(self, scheme: Scheme) -> bool:
        """Whether it loads a linear in that scheme."""
        fits = not self.groups or scheme.group_size in self.groups
        known = not self.kinds or scheme.kind in self.kinds
        return known and scheme.bits in self.bits and fits and (scheme.symmetric or self.asymmetric)

    @property
    def cells(self) -> tuple[str, str, str, str, str, str, str]:
        """It as a row of a table, under `HEADS`."""
        bits, groups, asymmetric, index = "none", "", "", ""
        if self.bits:
            bits = (
                f"{self.bits[0]} to {self.bits[-1]}"
                if len(self.bits) > 4
                else ", ".join(map(str, self.bits))
            )
            groups = (
                ", ".join("row" if group == -1 else str(group) for group in self.groups) or "any"
            )
            asymmetric, index = (
                ("yes" if self.asymmetric else "no"),
                ("yes" if self.index else "no"),
            )
        note = ": ".join(filter(None, (self.only and f"only {self.only}", self.note)))
        return self.engine, bits, groups, asymmetric, index, self.known, note

    def __str__(self) -> str:
        if not self.bits:
            return "nothing"
        _, bits, groups, *_ = self.cells
        grouped = f", groups of {_or(groups.replace('row', 'the row'))}" if self.groups else ""
        return f"{_or(bits)} bits{'' if self.asymmetric else ', symmetric'}{grouped}"


def _or(listed: str) -> str:
    """`4, 8` as `4 or 8`."""
    return " or ".join(listed.rsplit(", ", 1))


HEADS = ("engine", "bits", "groups", "zero points", "group index", "known", "")
_ALL, _GPTQ = (2, 3, 4, 5, 6, 7, 8), (2, 3, 4, 8)
_KERNELS = (32, 64, 128, -1)  # Marlin's
_CT, _PARTS = "compressed-tensors", "q, k, v alike; gate, up alike"
_MARLIN = f"{_PARTS}; run in groups of 128, the others read"

LOADS: tuple[Loads, ...] = (
    Loads(VLLM, _CT, (4, 8), _KERNELS, known="run", note=_MARLIN),
    Loads(VLLM, _CT, (4,), _KERNELS, asymmetric=True, known="run", note="the same"),
    Loads(
        VLLM,
        _CT,
        (8,),
        (64, 128, -1),
        asymmetric=True,
        known="read",
        only="on Hopper GPUs (Machete)",
    ),
    Loads(VLLM, _CT, (4,), (256,), asymmetric=True, known="read", only="by its Triton kernel"),
    Loads(VLLM, _CT, (4, 8), known="read", only="in float16 (Exllama)"),
    Loads(
        VLLM,
        _CT,
        _ALL,
        asymmetric=True,
        known="read",
        only="with the optional package of Humming kernels",
    ),
    Loads(SGLANG, _CT, (4, 8), _KERNELS, note=_PARTS),
    Loads(
        TRANSFORMERS,
        _CT,
        _ALL,
        asymmetric=True,
        known="run",
        note="unlike schemes: all symmetric; experts: symmetric",
    ),
    Loads(
        LMDEPLOY,
        _CT,
        (4,),
        (32, 128),
        asymmetric=True,
        known="run",
        note="one group size; run in groups of 128",
    ),
    Loads(
        VLLM,
        "awq",
        (4,),
        asymmetric=True,
        known="run",
        note="of q, k, v (gate, up) all or none skipped; run in groups of 128",
    ),
    Loads(
        SGLANG,
        "awq",
        (4,),
        _KERNELS,
        asymmetric=True,
        note="of q, k, v (gate, up) all or none skipped",
    ),
    Loads(LMDEPLOY, "awq", (4,), (128,), asymmetric=True, known="run"),
    Loads(AUTOAWQ, "awq", (4,), asymmetric=True),
    Loads(TRANSFORMERS, "awq", (4,), asymmetric=True),
    Loads(VLLM, "gptq", (4, 8), _KERNELS, known="run", note=_MARLIN),
    Loads(SGLANG, "gptq", (4, 8), _KERNELS, note=_PARTS),
    Loads(LMDEPLOY, "gptq", (4,), (128,), known="run"),
    Loads(
        GPTQMODEL,
        "gptq",
        _GPTQ,
        index=True,
        known="read",
        note="asymmetric: only what it has written itself",
    ),
    Loads(AUTOGPTQ, "gptq", _GPTQ, asymmetric=True, index=True),
    Loads(TRANSFORMERS, "gptq", _GPTQ, asymmetric=True, index=True),
    Loads(VLLM, "gptq_v2", (4, 8), _KERNELS, known="run", note=_MARLIN),
    Loads(SGLANG, "gptq_v2", (4, 8), _KERNELS, note=_PARTS),
    Loads(
        LMDEPLOY,
        "gptq_v2",
        known="run",
        note=(
            "does not look at checkpoint_format, and takes every zero point of version 2 for one"
            " more: wrong weights, without a word"
        ),
    ),
    Loads(GPTQMODEL, "gptq_v2", _GPTQ, asymmetric=True, index=True, known="read"),
    Loads(
        GPTQMODEL,
        "bitblas",
        (2, 4, 8),
        (32, 64, 128, -1),
        asymmetric=True,
        known="read",
        note="on a GPU; of a model in bfloat16 asymmetric alone",
    ),
    Loads(
        BITSANDBYTES,
        "bitsandbytes",
        (4,),
        known="run",
        note="transformers too; NF4 alone",
        kinds=("nf4",),
    ),
    Loads(VLLM, "bitsandbytes", known="read", note="knows no bitsandbytes (nor does LMDeploy)"),
    Loads(OLD_LMDEPLOY, "turbomind", (4,), asymmetric=True, known="read", note="no later one"),
    Loads(
        LLAMA_CPP,
        "gguf",
        (4, 8),
        asymmetric=True,
        known="run",
        note="and what is built on it: Ollama, LM Studio",
        kinds=("integer", "minimum"),
    ),
    Loads(
        TRANSFORMERS,
        "huggingface",
        _ALL,
        asymmetric=True,
        index=True,
        known="run",
        note="plain weights, which every engine loads",
        kinds=(),
    ),
)


def loads(engine: str, form: str, scheme: Scheme) -> bool:
    """Whether an engine is said to load a linear in that scheme from a checkpoint in that format,
    whatever else is installed or there."""
    return any(row.holds(scheme) for row in rows(form, engine) if not row.only)


def rows(form: str, engine: str | None = None) -> list[Loads]:
    """What is known of a format, by one engine or by all."""
    return [row for row in LOADS if row.format == form and engine in (None, row.engine)]


def refusals(
    form: str, modules: Mapping[str, Scheme], *, act_order: bool = False
) -> Iterator[Problem]:
    """What the table says that engines do not load of these modules. An engine of which there are
    but reports is not spoken of."""
    used = dict.fromkeys(modules.values())
    engines = dict.fromkeys(row.engine for row in rows(form) if row.known != "reported")
    for engine in engines if modules else ():
        own = rows(form, engine)
        if not any(row.bits for row in own):
            yield Problem(engine, own[0].note, hint=_instead(engine, form, used))
            continue
        if schemes := {scheme for scheme in used if not loads(engine, form, scheme)}:
            refused = [name for name, scheme in modules.items() if scheme in schemes]
            only = [
                next((row.only for row in own if row.only and row.holds(scheme)), "")
                for scheme in schemes
            ]
            refusal = (
                f"loads {{}} only {' or '.join(dict.fromkeys(only))}"
                if all(only)
                else "does not load {}"
            )
            expected = "; or ".join(str(row) for row in own if not row.only)
            what = f"{', '.join(sorted(map(str, schemes)))}{first_of(modules, refused)}"
            yield Problem(engine, refusal.format(what), expected, _instead(engine, form, schemes))
        # With one group a row, the order of the columns means nothing.
        if (
            act_order
            and not any(row.index for row in own)
            and any(scheme.group_size != -1 for scheme in used)
        ):
            yield Problem(
                engine,
                "does not load a group index (act_order: dynamic)",
                "act_order: static or none",
            )


def _instead(engine: str, form: str, schemes: Collection[Scheme]) -> str:
    """What the same engine would load: symmetric weights, or other formats of these."""
    offers = []
    if all(loads(engine, form, replace(scheme, symmetric=True)) for scheme in schemes):
        offers.append("weights.symmetric: true")
    others = dict.fromkeys(
        row.format
        for row in LOADS
        if row.engine == engine and row.format not in (form, "huggingface")
    )
    if fitting := [
        other for other in others if all(loads(engine, other, scheme) for scheme in schemes)
    ]:
        offers.append(f"pack {' or '.join(fitting)}")
    return ", or ".join(offers)


def unlike_parts(modules: Mapping[str, Scheme], ignored: Collection[str]) -> list[Problem]:
    """Said where q, k and v, or gate and up, of which engines make one linear, differ in scheme, or
    where only some are quantised."""
    plain = frozenset(ignored)
    unlike: dict[str, tuple[str, ...]] = {}  # the first part -> all of them
    for name in modules:
        parent, _, leaf = name.rpartition(".")
        for parts in FUSED.values():
            if leaf in parts:
                names = [f"{parent}.{part}" for part in parts]
                there = [part for part in names if part in modules or part in plain]
                if len({modules.get(part) for part in there}) > 1:
                    unlike[there[0]] = parts
    if not unlike:
        return []
    first, leaves = next(iter(unlike.items()))
    parent = first.rpartition(".")[0]
    schemes = ", ".join(
        f"{leaf} {modules.get(f'{parent}.{leaf}') or 'in 16 bits'}" for leaf in leaves
    )
    where = f"{parent}{f' and {len(unlike) - 1} more' if len(unlike) > 1 else ''}"
    hint = f"Match all of {', '.join(leaves)} in weights.ignore and overrides, or none"
    what = f"does not load unlike parts of what it fuses: {schemes} ({where})"
    return [Problem(f"{VLLM} and {SGLANG}", what, "one scheme, or none, for all of them", hint)]


def first_of(modules: Mapping[str, Scheme], chosen: Collection[str]) -> str:
    """Which modules, in short: ` (model.layers.0.mlp.up_proj and 3 more)`; nothing where it is all
    of them."""
    if len(chosen) == len(modules):
        return ""
    return f" ({next(iter(chosen))}{f' and {len(chosen) - 1} more' if len(chosen) > 1 else ''})"
