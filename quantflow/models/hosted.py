"""The architecture and the numbers of a family that a class of transformers computes."""

from __future__ import annotations

from collections.abc import Iterator

from quantflow.models.architecture import Architecture, Json
from quantflow.models.composite import flattened, whose
from quantflow.models.config import ConfigProblem, DecoderConfig, read_dtype
from quantflow.models.library import Library


def open_family(values: Json) -> Architecture:
    """The family of a config.json that has no table. Raises ConfigProblem."""
    library = Library(values)
    embedding, head = library.outer["embedding"], library.outer["head"]
    base = library.names.stored(f"{library.model.base_model_prefix}.x").removesuffix(".x")
    # of a composite, `sources` knows where a base model's prefix is missing
    inner = None if library.beside else library.model.base_model
    # the model itself where it has none of its class's name
    parts = tuple(dict(inner.named_children())) if inner not in (None, library.model) else ()
    return Architecture(
        library.name,
        (str(values["model_type"]),),
        lambda config: _decoder_config(library, config),
        sources=library.sources,
        prefix=f"{library.stored_prefix}.{{i}}",
        embedding=embedding,
        final_norm="",
        head=head,
        base=base,
        base_parts=parts,
        notes=(
            f"no table of QuantFlow's describes {values['model_type']}: its layers are computed by"
            f" {library.name} of {library.version}, and its segments are found",
            *_beside_note(library),
        ),
        library=library,
    )


def _beside_note(library: Library) -> Iterator[str]:
    base = library.model.base_model_prefix
    if parts := dict.fromkeys(whose(name, base) for name in library.beside):
        yield (
            f"the language model of {library.name} is quantised, on text alone;"
            f" {', '.join(parts)} {'are' if len(parts) > 1 else 'is'} copied"
        )


def _decoder_config(library: Library, values: Json) -> DecoderConfig:
    config, traces = library.config, [library.trace(i) for i in range(len(library.layers))]
    library.frame.check()
    channels = [segment.channels for trace in traces for segment in trace.segments]
    if not channels:
        raise ConfigProblem(f"layers of {library.name} have no linear that could be quantised")
    try:
        heads = getattr(config, "num_attention_heads", 0)
    except RuntimeError:  # as the class says where layers have their own
        heads = config.per_layer_config[0].num_attention_heads
    if not isinstance(heads, int):
        raise ConfigProblem(f"{library.name} has num_attention_heads {heads!r}, expected a number")
    cached = [trace.kv[1] for trace in traces if trace.kv]
    kv_heads, head_dim = cached[0] if cached else (0, 0)
    return DecoderConfig(
        family="hosted",
        hidden=library.hidden,
        intermediate=max(channels),
        layers=len(library.layers),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=library.state[f"{library.outer['embedding']}.weight"][0],
        max_positions=getattr(config, "max_position_embeddings", None) or 2048,
        norm_eps=0.0,
        activation=str(
            getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "")
        ),
        dtype=read_dtype(flattened(values)),
        tied=library.tied,
        experts=max((experts.count for experts in library.experts), default=0),
    )
