"""`pack`: what runs it is in `pack_writer.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from quantflow.errors import Problem
from quantflow.formats import FORMATS, Format
from quantflow.recipe.values import ByteSize
from quantflow.recipe.words import dotted, listing
from quantflow.recipe.written import Entry, Written
from quantflow.stages.base import PlannedStage


def _check_kv_scales(value: Any) -> Any:
    if value is True:
        raise ValueError(
            "fp8 (true wrote int8 scales, which vLLM refuses; int8 parameters lie beside the"
            " checkpoint without it)"
        )
    return None if value is False else value


KvScales = Annotated[
    Literal["fp8"] | None,
    BeforeValidator(_check_kv_scales),
    WithJsonSchema({"anyOf": [{"enum": ["fp8", False]}, {"type": "null"}]}),
]


class Pack(PlannedStage):
    """Write a checkpoint that other software loads."""

    name: ClassVar[str] = "pack"
    example: ClassVar[str] = "- pack: {format: compressed-tensors, max_shard_size: 2GB}"
    finish: ClassVar[str] = "quantflow.pipeline.packing:pack_checkpoint"
    writes: ClassVar[bool] = True

    format: Literal[
        "compressed-tensors",
        "awq",
        "gptq",
        "gptq_v2",
        "bitblas",
        "bitsandbytes",
        "turbomind",
        "gguf",
        "huggingface",
    ] = Field(description="The layout of the packed tensors: see `quantflow formats`.")
    requantize: bool = Field(
        default=False,
        description=(
            "Put on another grid, or round, what the format cannot hold exactly, and report the"
            " error."
        ),
    )
    kv_scales: KvScales = Field(
        default=None,
        description=(
            "Write scales of an fp8 KV cache into the checkpoint too: compressed-tensors alone, for"
            " vLLM and transformers."
        ),
    )
    max_shard_size: ByteSize = Field(
        default=5 * 10**9,
        description='Bytes a safetensors file, at most: "5GB", "512MiB" or an integer.',
    )

    @classmethod
    def check(cls, recipe: Written, entry: Entry) -> Iterator[Problem]:
        form = entry.settings.get("format")
        if isinstance(form, str):
            packs = [e for e in recipe.entries if e.name == cls.name]
            same = [e for e in packs if e.settings.get("format") == form]
            if same[0].position != entry.position:
                yield Problem(
                    entry.place,
                    f"packs the format {form} twice",
                    f"one pack stage a format; the first is at {same[0].place}",
                )
            if form in FORMATS and entry.settings.get("requantize") is not True:
                place = recipe.source.place(entry.steps("format"))
                yield from _unheld(recipe, FORMATS[form], place)


def _unheld(recipe: Written, form: Format, place: str) -> Iterator[Problem]:
    """What the format at `place` cannot hold, as far as the recipe alone says it."""
    widths = form.ability.bits  # of integers; none where it holds none
    for steps, bits in recipe.of_weights(("bits",)) if widths else ():
        if bits in range(2, 9) and bits not in widths and not isinstance(bits, bool):
            hint = "Pack compressed-tensors instead"
            if len(steps) > 2:
                hint += ", or use ignore: true"
            origin = recipe.source.place(steps)
            problem = (
                f"the format {form.name} cannot hold {bits} bits (`{dotted(steps)}`, {origin})"
            )
            yield Problem(place, problem, f"{listing(map(str, widths))} bits", hint)
    for entry in recipe.entries if not form.holds_index else ():
        if entry.settings.get("act_order") == "dynamic":
            origin = recipe.source.place(entry.steps("act_order"))
            yield Problem(
                place,
                f"the format {form.name} cannot hold act_order: dynamic ({origin})",
                "act_order static or none",
                "static has its accuracy without a group index",
            )
