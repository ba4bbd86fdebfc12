"""What a recipe may say, as frozen types, and the JSON schema that editors check a recipe with.

Here is what one value can be: its type and range. What values may stand together, and which file a
name means, is in `loader.py`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Strict,
    Tag,
    WithJsonSchema,
    model_validator,
)

from quantflow.bundled import BUNDLED, BUNDLED_NEW

DATA_NAMES = ("c4", "c4-new", "ptb", "ptb-new", "wikitext2", "pileval", BUNDLED, BUNDLED_NEW)
AUTO = 0  # in a typed recipe, what `auto` becomes; a plan puts the model's number in its place

_SIZE_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20,
    "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE_PATTERN = r"^[0-9]{1,15}(\.[0-9]{1,15})? ?([KMGTkmgt][Ii]?)?[Bb]$"
_MIN_SHARD_BYTES = 1024  # a bare 5 was meant as "5GB"
_MIN_GROUP_SIZE = 4
_MIN_LENGTH = 16  # tokens a window
_GROUP_SIZES = f"-1 (one group a row) or an integer of at least {_MIN_GROUP_SIZE}"
_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # it becomes a directory's name

WeightBits = Literal[2, 3, 4, 5, 6, 7, 8]


def parse_bytes(value: Any) -> int:
    """Bytes in an integer or a text such as `5GB` or `512 MiB` (GB is 10^9, GiB 2^30). ValueError
    for anything else."""
    if isinstance(value, str) and re.fullmatch(_SIZE_PATTERN, value):
        number, unit = re.split(r" ?(?=[A-Za-z])", value, maxsplit=1)
        value = int(float(number) * _SIZE_UNITS[unit.upper()])
    if isinstance(value, bool) or not isinstance(value, int) or value < _MIN_SHARD_BYTES:
        raise ValueError(
            f'a size such as "5GB" or "512MiB", or an integer of at least {_MIN_SHARD_BYTES} bytes'
        )
    return value


def _check_group_size(value: int) -> int:
    if value != -1 and value < _MIN_GROUP_SIZE:
        raise ValueError(_GROUP_SIZES)
    return value


GroupSize = Annotated[
    int,
    AfterValidator(_check_group_size),
    WithJsonSchema({"anyOf": [{"const": -1}, {"type": "integer", "minimum": _MIN_GROUP_SIZE}]}),
]


def _or_auto(what: str) -> tuple[BeforeValidator, PlainSerializer]:
    """`auto` beside integers that are not 0; `what` says which."""

    def read(value: Any) -> Any:
        if value == "auto":
            return AUTO
        if (value == AUTO and not isinstance(value, bool)) or (
            isinstance(value, str) and not re.fullmatch(r"[-+0-9.e ]+", value)
        ):
            raise ValueError(f"auto, {what}")
        return value

    return BeforeValidator(read), PlainSerializer(lambda value: "auto" if value == AUTO else value)


def _check_length(value: int) -> int:
    if value != AUTO and value < _MIN_LENGTH:
        raise ValueError(f"auto, or an integer greater than or equal to {_MIN_LENGTH}")
    return value


_AS_WRITTEN: Any = {"default": "auto"}
Symmetric = Annotated[
    bool | None, BeforeValidator(lambda value: None if value == "auto" else value),
    PlainSerializer(lambda value: "auto" if value is None else value),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "boolean"}, {"type": "null"}]}),
]  # fmt: skip
Length = Annotated[
    int,
    AfterValidator(_check_length),
    *_or_auto(f"or an integer greater than or equal to {_MIN_LENGTH}"),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": _MIN_LENGTH}]}),
]
AutoGroupSize = Annotated[
    int,
    AfterValidator(lambda value: value if value == AUTO else _check_group_size(value)),
    *_or_auto(_GROUP_SIZES),
    WithJsonSchema(
        {
            "anyOf": [
                {"const": "auto"},
                {"const": -1},
                {"type": "integer", "minimum": _MIN_GROUP_SIZE},
            ]
        }
    ),
]
ByteSize = Annotated[
    int,
    BeforeValidator(parse_bytes),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": _MIN_SHARD_BYTES},
                {"type": "string", "pattern": _SIZE_PATTERN},
            ]
        }
    ),
]


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
NonEmpty = Annotated[str, Field(min_length=1)]


_DATA = (
    f"A data set's name ({', '.join(DATA_NAMES)}) or the path of a local file: text, JSON lines,"
    " JSON, CSV or Parquet."
)
_FIELD = (
    "The field of a row, or the column, that holds the text or the dialogue, where it is not one of"
    " the usual."
)


class Section(BaseModel):
    """A mapping of the recipe. An unknown key is an error, and so is `"4"` for 4; an integer serves
    where a float is asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Calibration(Section):
    """The text that the statistics are taken from."""

    data: NonEmpty = Field(default=BUNDLED, description=f"{_DATA} demo is the bundled text.")
    file: NonEmpty | None = Field(
        default=None, description="A local copy of the named data set, read instead of the hub."
    )
    field: NonEmpty | None = Field(default=None, description=_FIELD)
    samples: int = Field(default=128, ge=1, description="Windows to take.")
    seqlen: Length = Field(
        default=AUTO,
        json_schema_extra=_AS_WRITTEN,
        description="Tokens a window. auto: 2048, or what the model has positions for.",
    )
    skip: int = Field(default=0, ge=0, description="Documents left out at the start.")


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
    symmetric: Symmetric = Field(
        default=None,
        json_schema_extra=_AS_WRITTEN,
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


class Calibrate(Section):
    """Take statistics of every linear's input and output, and of K and V per head and channel."""

    name: ClassVar[str] = "calibrate"


class Awq(Section):
    """Scale the channels that the activations make important, folded into the preceding norm or
    linear (AWQ)."""

    name: ClassVar[str] = "awq"
    grid: int = Field(
        default=20,
        ge=1,
        le=1000,
        description="Steps of the exponent between 0 and 1 that the scale search tries.",
    )
    clip: bool = Field(
        default=True, description="Also search for the range that each group is clipped to."
    )
    max_tokens: int = Field(
        default=8192,
        ge=1,
        description="Calibration tokens that the loss of the searches is measured on, at most.",
    )


class Gptq(Section):
    """Round with error feedback through the inverse Hessian of the layer's inputs (GPTQ)."""

    name: ClassVar[str] = "gptq"
    act_order: Literal["none", "static", "dynamic"] = Field(
        default="static",
        description=(
            "Order of the columns. static: by importance, groups stay contiguous, every format"
            " holds it. dynamic: groups follow the order (g_idx), for the GPTQ formats and plain"
            " weights."
        ),
    )
    damp: float = Field(
        0.01, gt=0, lt=1, description="Added to the Hessian's diagonal, as a share of its mean."
    )
    range_search: bool = Field(
        default=True,
        description=(
            "Search each group's range for the least weighted error, rather than take min and max."
        ),
    )
    refine: int = Field(
        default=4,
        ge=0,
        le=100,
        description="Passes of coordinate descent over codes and scales after GPTQ; 0: plain GPTQ.",
    )


class Rtn(Section):
    """Round to nearest. Needs no calibration."""

    name: ClassVar[str] = "rtn"
    range_search: bool = Field(
        default=False,
        description=(
            "Search each group's range for the least squared error, rather than take min and max."
        ),
    )


class Nf4(Section):
    """Round to the nearest of NF4's 16 numbers, in blocks of 64 (QLoRA; what people know as
    `load_in_4bit`). Needs no calibration, and takes neither bits nor group size from `weights`."""

    name: ClassVar[str] = "nf4"
    double_quant: bool = Field(
        default=False,
        description="Quantise the blocks' scales too: 4.13 bits a weight rather than 4.5.",
    )


class KvQparams(Section):
    """Scales and zero points for an int8 KV cache, measured on the K and V of the quantised
    model."""

    name: ClassVar[str] = "kv_qparams"
    bits: Literal[8] = Field(default=8, description="Bits a cached value.")
    symmetric: bool = Field(
        default=False,
        description="absmax / 127 without a zero point, rather than (max - min) / 255.",
    )
    granularity: Literal["tensor", "head", "channel"] = Field(
        default="tensor", description="Values that share a scale."
    )


class Pack(Section):
    """Write a checkpoint that other software loads."""

    name: ClassVar[str] = "pack"
    format: Literal[
        "compressed-tensors",
        "awq",
        "gptq",
        "gptq_v2",
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


class Shard(Section):
    """Cut the packed tensors for tensor parallelism."""

    name: ClassVar[str] = "shard"
    tp: Literal[2, 4, 8, 16, 32, 64] = Field(description="Ranks.")


class Gates(Section):
    """Limits; a run that misses one keeps its artifact, marks it as failed and exits with 3."""

    kl_mean: float | None = Field(
        default=None,
        gt=0,
        description="Largest mean KL divergence per token to the full-precision model, in nats.",
    )
    kl_p99: float | None = Field(
        default=None,
        gt=0,
        description="Largest 99th percentile of the KL divergence per token, in nats.",
    )
    top1: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Smallest share of tokens with the same most likely successor.",
    )
    perplexity_ratio: float | None = Field(
        default=None,
        ge=1,
        description="Largest perplexity, as a multiple of the full-precision model's.",
    )


class Evaluate(Section):
    """Compare with the full-precision model, on text that was not used for calibration."""

    name: ClassVar[str] = "evaluate"
    data: NonEmpty = Field(
        default=BUNDLED_NEW, description=f"{_DATA} demo-new is bundled, other pages than demo's."
    )
    file: NonEmpty | None = Field(
        default=None, description="A local copy of the named data set, read instead of the hub."
    )
    field: NonEmpty | None = Field(default=None, description=_FIELD)
    windows: int = Field(default=64, ge=1, description="Windows to take.")
    length: Length = Field(
        default=AUTO,
        json_schema_extra=_AS_WRITTEN,
        description="Tokens a window. auto: 512, or what the model has positions for.",
    )
    skip: int = Field(default=0, ge=0, description="Documents left out at the start.")
    engine: bool = Field(
        default=False,
        description="Measure the engine's own kernels and KV cache, not the same in float32.",
    )
    gates: Gates = Field(default=Gates(), description="Limits that the result must keep.")


Stage = Calibrate | Awq | Gptq | Rtn | Nf4 | KvQparams | Pack | Shard | Evaluate
STAGE_TYPES: dict[str, type[Stage]] = {
    c.name: c for c in (Calibrate, Awq, Gptq, Rtn, Nf4, KvQparams, Pack, Shard, Evaluate)
}  # in their order


def stage_name(value: Any) -> str | None:
    """The name that an entry of `stages` gives: `gptq` for `gptq`, `{gptq: …}` or a Gptq. None for
    what is no entry."""
    if isinstance(value, dict) and len(value) == 1:
        value = next(iter(value))
    if isinstance(value, str):
        return value
    return value.name if type(value) in STAGE_TYPES.values() else None


def stage_settings(value: Any) -> Any:
    """The settings in an entry of `stages`: an empty mapping for a bare name or `- gptq:`."""
    if isinstance(value, str):
        return {}
    if isinstance(value, dict):
        settings = next(iter(value.values()))
        return {} if settings is None else settings
    return value


_Entry = Annotated[
    Annotated[Calibrate, BeforeValidator(stage_settings), Tag("calibrate")]
    | Annotated[Awq, BeforeValidator(stage_settings), Tag("awq")]
    | Annotated[Gptq, BeforeValidator(stage_settings), Tag("gptq")]
    | Annotated[Rtn, BeforeValidator(stage_settings), Tag("rtn")]
    | Annotated[Nf4, BeforeValidator(stage_settings), Tag("nf4")]
    | Annotated[KvQparams, BeforeValidator(stage_settings), Tag("kv_qparams")]
    | Annotated[Pack, BeforeValidator(stage_settings), Tag("pack")]
    | Annotated[Shard, BeforeValidator(stage_settings), Tag("shard")]
    | Annotated[Evaluate, BeforeValidator(stage_settings), Tag("evaluate")],
    Discriminator(stage_name),
]


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
    stages: Annotated[tuple[_Entry, ...], Strict(False)] = Field(
        description=(
            f"Stages, in this order: {', '.join(STAGE_TYPES)}; a bare name or one name with its"
            " settings."
        )
    )

    @model_validator(mode="before")
    @classmethod
    def _default_output(cls, data: Any) -> Any:
        # with a name that is wrong, that is the problem to report
        if isinstance(data, dict) and data.get("output") is None:
            name = data.get("name")  # of a list, an alias can make a text without end
            return {**data, "output": f"artifacts/{name if isinstance(name, str) else None}"}
        return data


def dump(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain dictionaries and lists in the form of the YAML file, defaults written
    out; it validates to the same recipe."""
    data = recipe.model_dump(mode="json", exclude={"stages"})
    data["stages"] = [{stage.name: stage.model_dump(mode="json")} for stage in recipe.stages]
    return data


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a recipe file, bare stage names included, for a YAML
    language server."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    settings: dict[str, Any] = {}
    bare: list[dict[str, str]] = []
    for name, kind in STAGE_TYPES.items():
        ref = {"$ref": f"#/$defs/{kind.__name__}"}
        description = definitions[kind.__name__]["description"]
        if definitions[kind.__name__].get("required"):
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
    schema["properties"]["stages"]["items"] = {"anyOf": [*bare, mapping]}
    schema["required"].remove("output")  # the loader's default depends on the name
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "QuantFlow recipe",
    }
