"""What a recipe says, as frozen types, and the JSON schema that editors check a recipe with.

Here is what one value can be: its type and range. What values may stand together is in `checks.py`
and in the stages, and which file a name means in `files.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, Strict, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from quantflow.bundled import BUNDLED
from quantflow.recipe.stage import Stage, Stages, stage_name, stage_settings
from quantflow.recipe.values import (
    AS_WRITTEN,
    AUTO,
    DATA,
    FIELD,
    AutoGroupSize,
    GroupSize,
    Length,
    NonEmpty,
    Section,
    Symmetric,
    WeightBits,
)

_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # it becomes a directory's name


class Calibration(Section):
    """The text that the statistics are taken from."""

    data: NonEmpty = Field(default=BUNDLED, description=f"{DATA} demo is the bundled text.")
    file: NonEmpty | None = Field(
        default=None, description="A local copy of the named data set, read instead of the hub."
    )
    field: NonEmpty | None = Field(default=None, description=FIELD)
    samples: int = Field(default=128, ge=1, description="Windows to take.")
    seqlen: Length = Field(
        default=AUTO,
        json_schema_extra=AS_WRITTEN,
        description="Tokens a window. auto: 2048, or what the model has positions for.",
    )
    skip: int = Field(default=0, ge=0, description="Documents left out at the start.")

    @property
    def count(self) -> int:
        return self.samples

    @property
    def tokens(self) -> int:
        return self.seqlen


class Override(Section):
    """Other settings for the linears whose name matches. The last match counts."""

    match: NonEmpty = Field(
        description='A shell pattern over the full module name, such as "*.down_proj".'
    )
    bits: WeightBits | None = Field(
        default=None, description="Bits a weight, instead of the recipe's."
    )
    group_size: GroupSize | None = Field(
        default=None, description="Input channels that share a scale, instead of the recipe's."
    )
    symmetric: bool | None = Field(
        default=None, description="Whether the grid is symmetric, instead of the recipe's."
    )
    ignore: bool = Field(default=False, description="Leave these linears in 16 bits.")


class Weights(Section):
    """The grid that the linears' weights are rounded to."""

    bits: WeightBits = Field(
        default=4, description="Bits a weight; 5, 6 and 7 for compressed-tensors alone."
    )
    group_size: AutoGroupSize = Field(
        default=128,
        description=(
            "Input channels that share a scale; -1: the whole row. auto: the largest of 128, 64 and"
            " 32 that fits all linears, else the largest from 16 that does, else -1."
        ),
    )
    numbers: NonEmpty = Field(
        default="integer",
        description=(
            "What codes stand for. integer: a scale and a zero point a group. minimum: a scale and"
            " a floating minimum, by rtn, for gguf."
        ),
    )
    symmetric: Symmetric = Field(
        default=None,
        json_schema_extra=AS_WRITTEN,
        description=(
            "Fix the zero point at the middle code. auto: what every engine loads of the first"
            " pack: true for gptq, gptq_v2, gguf and for mixtures in compressed-tensors, else"
            " false."
        ),
    )
    ignore: Annotated[tuple[NonEmpty, ...], Strict(False)] = Field(
        default=("lm_head",),
        description=(
            "Linears that stay in 16 bits, as shell patterns over the full module name; one that"
            " matches nothing is a warning."
        ),
    )
    overrides: Annotated[tuple[Override, ...], Strict(False)] = Field(
        default=(), description="Other settings for some linears."
    )


# errors of pydantic's that are ours
NO_STAGE, UNKNOWN_STAGE = "no_stage", "unknown_stage"


def _stage(value: Any, info: ValidationInfo) -> Any:
    """A stage of an entry of `stages`, by the registry in the validation's context."""
    if isinstance(value, Stage):
        return value
    kinds: Stages = (info.context or {}).get("stages", {})
    name = stage_name(value)
    if name is None:
        raise PydanticCustomError(NO_STAGE, "a stage's name, or one name with its settings")
    if name not in kinds:
        raise PydanticCustomError(UNKNOWN_STAGE, "no stage {tag}", {"tag": name})
    return kinds[name].model_validate(stage_settings(value))


class Recipe(Section):
    """A model, and the stages it goes through on its way to an artifact."""

    name: str = Field(
        pattern=_NAME_PATTERN,
        max_length=128,
        description="What the artifact is called: letters, digits, '.', '_' and '-'.",
    )
    model: NonEmpty | None = Field(
        default=None, description="A model directory or hub id. May be left to the command line."
    )
    output: NonEmpty = Field(
        description=(
            "Where the artifact goes. Default: artifacts/<name>, or artifacts/<model>_<name> with"
            " --model."
        )
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of every random choice.")
    calibration: Calibration | None = Field(
        default=None, description="The text that the statistics are taken from."
    )
    weights: Weights = Field(
        default=Weights(), description="The grid that the linears' weights are rounded to."
    )
    stages: Annotated[tuple[Annotated[Stage, BeforeValidator(_stage)], ...], Strict(False)] = Field(
        description="Stages; a bare name or one name with its settings."
    )

    @model_validator(mode="before")
    @classmethod
    def _default_output(cls, data: Any) -> Any:
        # with a name that is wrong, that is the problem to report
        if isinstance(data, dict) and data.get("output") is None:
            name = data.get("name")  # of a list, an alias can make a text without end
            return {**data, "output": f"artifacts/{name if isinstance(name, str) else None}"}
        return data


def read_recipe(data: Mapping[Any, Any], kinds: Stages) -> Recipe:
    """The recipe in plain data of the form of the YAML file. Raises pydantic's ValidationError."""
    return Recipe.model_validate(data, context={"stages": kinds})


def dump(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain dictionaries and lists in the form of the YAML file, defaults written
    out; `read_recipe` makes the same of it."""
    data = recipe.model_dump(mode="json", exclude={"stages"})
    data["stages"] = [{stage.name: stage.model_dump(mode="json")} for stage in recipe.stages]
    return data


def json_schema(kinds: Stages) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a recipe file of stages of these `kinds`, bare stage names
    included, for a YAML language server."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    del definitions[Stage.__name__]
    settings: dict[str, Any] = {}
    bare: list[dict[str, str]] = []
    for name, kind in kinds.items():
        own = kind.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= own.pop("$defs", {})
        definitions[kind.__name__] = own
        ref, description = {"$ref": f"#/$defs/{kind.__name__}"}, own["description"]
        if own.get("required"):
            settings[name] = {"description": description, **ref}
        else:
            settings[name] = {"description": description, "anyOf": [ref, {"type": "null"}]}
            bare.append({"const": name, "description": description})
    mapping = {
        "type": "object",
        "properties": settings,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    stages = schema["properties"]["stages"]
    stages["items"] = {"anyOf": [*bare, mapping]}
    order = f"Stages, in this order: {', '.join(kinds)};"
    stages["description"] = stages["description"].replace("Stages;", order, 1)
    schema["required"].remove("output")  # the loader's default depends on the name
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "$defs": dict(sorted(definitions.items())),
        "title": "QuantFlow recipe",
    }
