"""What the requests of other servers may carry and this one does not read: vLLM's, LMDeploy's,
SGLang's, llama.cpp's and OpenAI's own fields, each with the values that change nothing here. Those
are accepted, so that a client which sends its defaults is served; any other is refused by name,
since it would change the answer. A field that a model declares itself is the model's, whatever
stands here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    WrapValidator,
    create_model,
)
from pydantic_core import PydanticCustomError

Model = TypeVar("Model", bound=BaseModel)

# By words in the type of a part: image_url, input_image, image_data; input_audio, audio_url, ...
MEDIA = {
    "image": "images are",
    "audio": "audio is",
    "video": "video is",
    "file": "files are",
    "document": "documents are",
}
NEUTRAL = "x-changes-nothing"  # how the document at /openapi.json marks such a field
# the code of a value that is none of these, and pydantic's type of the error
REFUSED = "unsupported_parameter"


@dataclass(frozen=True)
class Foreign:
    """accepts: the type of the values that change nothing, beside null. expected: they in words.
    hint: what to do instead."""

    accepts: Any
    expected: str
    hint: str = ""


def only(*values: Any, hint: str = "") -> Foreign:
    """Nothing but these values and null."""

    def check(value: Any) -> Any:
        if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values):
            raise ValueError
        return value

    literal = Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": list(values)})]
    return Foreign(
        literal if values else NoneType, " or ".join(map(json.dumps, values)) or "none", hint
    )


ANY = Foreign(Any, "any value")
LABEL = Foreign(Annotated[str, StringConstraints(max_length=4096)], "at most 4096 characters")
SWITCH = Foreign(bool, "true or false")
NUMBER = Foreign(float, "a number")

BACKEND = Foreign(
    Literal["auto", "xgrammar", "guidance", "outlines", "lm-format-enforcer"],
    "the name of one of vLLM's",
)

_FORMAT = "Use response_format"
_SPACES = "JSON has no spaces between its parts here"
_IDS = "Use return_token_ids"
_PENALTY = "Use repetition_penalty"
_TEMPLATE = "Use chat_template_kwargs"
_MOST = "Use max_tokens"


def _each(names: str, field: Foreign) -> dict[str, Foreign]:
    return dict.fromkeys(names.split(), field)


REQUEST: dict[str, Foreign] = {
    # Labels and hints of OpenAI's, which say nothing of what the answer is: nothing is stored,
    # moderated or billed here.
    **_each("service_tier store prediction prompt_cache_options prompt_cache_retention", ANY),
    **_each("user safety_identifier prompt_cache_key", LABEL),
    "metadata": Foreign(
        Annotated[dict[str, Annotated[str, Field(max_length=4096)]], Field(max_length=16)],
        "at most 16 labels",
    ),
    "verbosity": only("low", "medium", "high"),
    # OpenAI's that would.
    **_each("audio moderation web_search_options", only()),
    "function_call": only("none", "auto", hint="Use tool_choice"),
    "functions": only([], hint="Use tools"),
    "modalities": only(["text"], []),
    "suffix": only(""),
    "best_of": only(1, hint="Use n, or best_of in /v1/completions"),
    "echo": only(False, hint="/v1/completions has it"),
    # vLLM's
    **_each("request_id rid", LABEL),
    "session_id": Foreign(
        int | str, "a number or a text", "Every request brings its whole dialogue"
    ),
    **_each(
        "cache_salt extra_key",
        only(
            hint=(
                "The prefix cache is shared by all who may use the server; --no-prefix-cache turns"
                " it off"
            )
        ),
    ),
    **_each(
        "use_beam_search watermarking return_tokens_as_token_ids return_prompt_text early_stopping",
        only(False),
    ),
    **_each("length_penalty typical_p typ_p tfs_z tfs num_beams", only(1)),
    # nothing is put between tokens
    **_each("spaces_between_special_tokens return_token_offsets return_mm_kwargs", SWITCH),
    **_each("truncate_prompt_tokens prompt_embeds repetition_detection structural_tag", only()),
    "guided_decoding_backend": BACKEND,
    "guided_whitespace_pattern": only("", hint=_SPACES),
    "truncation_side": only("left", "right"),
    **_each("logprob_token_ids allowed_token_ids bad_words logits_processors", only([])),
    "thinking_token_budget": only(-1),
    "include_reasoning": only(True),
    "detokenize": only(True, hint=_IDS),
    "chat_template": only(hint=_TEMPLATE),
    # The chat template's, where there is none.
    "chat_template_kwargs": only({}),
    **_each("reasoning_effort enable_thinking", only("none", False)),
    "documents": only([]),
    "add_special_tokens": only(False, hint="A chat template writes them"),
    "add_generation_prompt": only(True),
    "continue_final_message": only(False),
    # of images and the like, which are refused themselves
    **_each("media_io_kwargs mm_processor_kwargs", ANY),
    **_each("kv_transfer_params ec_transfer_params vllm_xargs", only({})),
    "routed_experts_prompt_start": only(0),
    "stream_interval": ANY,  # how tokens are cut into events
    # LMDeploy's
    # every request brings its whole dialogue, so that there is nothing to renew
    "renew_session": SWITCH,
    # its APIClient sends what it does not know so
    "kwargs": only({}, hint="Put what is in it beside the other parameters"),
    "do_preprocess": only(True, hint="/v1/completions takes a prompt as it is"),
    **_each("repetition_ngram_size repetition_ngram_threshold", only(0)),
    **_each("return_logprob return_routed_experts", only(False)),
    "input_ids": only([], hint="/v1/completions takes them as its prompt"),
    **_each("image_url image_data adapter_name", only("", [])),
    # SGLang's
    **_each(
        "return_hidden_states return_prompt_token_ids return_meta_info return_sampling_mask",
        only(False),
    ),
    **_each(
        "return_input_ids_in_sglext return_output_ids_in_sglext"
        " return_flat_raw_output_top_logprobs",
        only(False),
    ),
    **_each("return_cached_tokens_details return_spec_tokens_details", only(False)),
    **_each(
        "sampling_logprobs_mode task custom_logit_processor watermark lora_path stop_regex",
        only([], ""),
    ),
    **_each("session_params custom_params", only({})),
    **_each("bootstrap_host bootstrap_port bootstrap_room", only()),
    **_each(
        "data_parallel_rank routed_dp_rank disagg_prefill_dp_rank routed_experts_start_len", only(0)
    ),
    **_each(
        "max_dynamic_patch min_dynamic_patch use_audio_in_video images_config video_config"
        " custom_labels",
        ANY,
    ),
    # reasoning stands in the text as the model wrote it
    **_each("separate_reasoning stream_reasoning", SWITCH),
    "no_stop_trim": only(False, hint="Use include_stop_str_in_output"),
    "thinking": only(hint=_TEMPLATE),
    # llama.cpp's
    **_each("n_predict max_new_tokens max_length", only(-1, hint=_MOST)),
    **_each("repeat_penalty", only(1, hint=_PENALTY)),
    "repeat_last_n": only(-1),
    **_each(
        "dynatemp_range mirostat mirostat_mode n_probs min_keep n_indent dry_multiplier"
        " xtc_probability t_max_predict_ms",
        only(0),
    ),
    **_each(
        "dynatemp_exponent dry_base dry_allowed_length dry_penalty_last_n xtc_threshold"
        " mirostat_tau mirostat_eta",
        NUMBER,
    ),
    "dry_sequence_breakers": ANY,  # dry_multiplier says whether they count
    "top_n_sigma": only(-1),
    # of its cache, or for keeping a connection open
    **_each("id_slot n_keep n_discard n_cache_reuse sse_ping_interval", NUMBER),
    "cache_prompt": SWITCH,
    **_each("timings_per_token return_progress post_sampling_probs", only(False)),
    "return_tokens": only(False, hint=_IDS),
    **_each("samplers response_fields lora", only([])),
    # and SGLang's; those that take a format have them themselves
    **_each("grammar regex ebnf json_schema", only("", hint=_FORMAT)),
    "reasoning_format": only("none", "auto"),
    **_each("reasoning_budget thinking_budget_tokens", only(-1)),
    "parse_tool_calls": only(True),
    # Ollama's
    "keep_alive": ANY,
    "options": only({}, hint="Put what is in it beside the other parameters"),
    "think": only(hint=_TEMPLATE),
}

_CHAT = "/v1/chat/completions has it"

# What chat completions read themselves, for the APIs beside them: clients send it there, too.
CHAT: dict[str, Foreign] = {
    **_each(
        "min_tokens min_new_tokens min_p priority top_logprobs frequency_penalty presence_penalty",
        only(0, hint=_CHAT),
    ),
    **_each("n repetition_penalty", only(1, hint=_CHAT)),
    **_each(
        "messages max_tokens max_completion_tokens seed top_k prompt_logprobs", only(hint=_CHAT)
    ),
    **_each("stop stop_token_ids tools", only([], hint=_CHAT)),
    "logit_bias": only({}, hint=_CHAT),
    **_each(
        "ignore_eos include_stop_str_in_output return_token_ids logprobs", only(False, hint=_CHAT)
    ),
    "skip_special_tokens": only(True, hint=_CHAT),
    "do_sample": only(True, hint="Use temperature: 0"),
    "stream_options": only({}, {"include_usage": True}),  # it is told anyway
    "tool_choice": only("none", "auto", hint=_CHAT),
    "parallel_tool_calls": SWITCH,
    "response_format": only({"type": "text"}, hint=_CHAT),
    **_each(
        "structured_outputs guided_json guided_regex guided_choice guided_grammar", only(hint=_CHAT)
    ),
}
# what dialogues in another API's words do not read of them
DIALOGUE: dict[str, Foreign] = {**REQUEST, **CHAT}

# What the messages of answers carry, and their clients put back into a history.
MESSAGE: dict[str, Foreign] = {
    **_each(
        "annotations citations parsed reasoning_details thinking_blocks provider_specific_fields"
        " cache_control",
        ANY,
    ),
    "id": LABEL,
    "audio": only(),
    "images": only([]),
    "function_call": only(hint="Use tool_calls"),
    **_each("prefix partial", only(False, hint="Use continue_final_message")),
}
# Of vLLM's structured_outputs: how its server goes about them.
STRUCTURED: dict[str, Foreign] = {
    **_each("disable_any_whitespace disable_fallback", SWITCH),
    "disable_additional_properties": only(False, hint="Say so in the schema"),
    "whitespace_pattern": only("", hint=_SPACES),
    "structural_tag": only(),
    "backend": BACKEND,
}
PART: dict[str, Foreign] = {**_each("annotations cache_control", ANY), "id": LABEL}
CALL: dict[str, Foreign] = {
    "index": NUMBER,
    **_each("parsed_arguments provider_specific_fields extra_content cache_control", ANY),
}


def extended(base: type[Model], fields: Mapping[str, Foreign]) -> type[Model]:
    """`base` with these fields, which accept what changes nothing and refuse the rest in words."""
    own: dict[str, Any] = {
        name: (
            Annotated[field.accepts | None, WrapValidator(_refusing(field))],
            Field(default=None, json_schema_extra={NEUTRAL: True}),
        )
        for name, field in fields.items()
        if name not in base.model_fields
    }
    return create_model(
        f"{base.__name__}Extended", __base__=base, __module__=base.__module__, **own
    )


def wrong(field: Foreign, value: Any) -> str | None:
    """What is wrong with a value, where it would change something."""
    try:
        TypeAdapter(field.accepts | None).validate_python(value, strict=True)
    except ValidationError:
        return _words(field)
    return None


def _words(field: Foreign) -> str:
    return f"this value is not supported here; expected {field.expected}" + (
        f". {field.hint}" if field.hint else ""
    )


def known_types(what: str, *types: str, media: bool = False) -> BeforeValidator:
    """For an object whose `type` is one of these, the first where it tells none; another is refused
    by its name. what: such objects.
    media: whether they are of a content, in which images and the like are called so."""

    def check(value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if not isinstance(kind, str) or kind in types:
            return value
        name = next((name for word, name in MEDIA.items() if media and word in kind), None)
        words = (
            f"{name or f'{what} of type {kind[:80]!r} are'} not supported here; expected"
            f" {'text' if name else ' or '.join(types)}"
        )
        raise PydanticCustomError(REFUSED, "{words}", {"words": words})

    return BeforeValidator(check)


def _refusing(field: Foreign) -> Callable[[Any, Callable[[Any], Any]], Any]:
    def check(value: Any, inner: Callable[[Any], Any]) -> Any:
        if value is None:
            return None
        try:
            return inner(value)
        except ValidationError:
            raise PydanticCustomError(REFUSED, "{words}", {"words": _words(field)}) from None

    return check
