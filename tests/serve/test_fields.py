"""What clients of other servers send beside what this one reads: accepted where it changes nothing,
refused by name where it would."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from quantflow.serve.fields import ANY, CALL, MESSAGE, REQUEST
from quantflow.serve.messages.protocol import MessagesRequest
from quantflow.serve.requests import (
    ChatRequest,
    Constrained,
    InteractiveRequest,
    Sampling,
    Templated,
)
from quantflow.serve.responses.protocol import ResponsesRequest
from tests.helpers.serving import NEUTRAL_IN_CHAT, Running

HI = {"role": "user", "content": "What is a table?"}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [HI], "max_tokens": 4, "temperature": 0},
    "/v1/completions": {"prompt": "The table", "max_tokens": 4, "temperature": 0},
    "/v1/chat/interactive": {
        "prompt": "x",
        "request_output_len": 4,
        "temperature": 0.0,
        "top_k": 1,
    },
}
CHAT, COMPLETIONS, _ = ROUTES

# What each client sends by itself, as its source of 2026 says (LMDeploy 0.16, vLLM, SGLang 0.5,
# llama.cpp's page): its defaults.
LMDEPLOY_CHAT = {
    "model": "m", "temperature": 0.0, "top_p": 1.0, "logprobs": False, "top_logprobs": 0, "n": 1,
    "max_completion_tokens": None, "stop": None, "stream": False, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "user": None, "repetition_penalty": 1.0, "ignore_eos": False,
    "skip_special_tokens": True, "spaces_between_special_tokens": True, "top_k": 40,
    "min_new_tokens": None, "min_p": 0.0, "logit_bias": None, "stream_options": None, "kwargs": {},
}  # fmt: skip
LMDEPLOY_COMPLETIONS = {
    "model": "m", "suffix": None, "temperature": 0.0, "n": 1, "max_completion_tokens": 16,
    "stream": False, "stop": None, "top_p": 1.0, "top_k": 40, "user": None,
    "repetition_penalty": 1.0, "ignore_eos": False, "skip_special_tokens": True,
    "spaces_between_special_tokens": True, "stream_options": None, "kwargs": {},
}  # fmt: skip
VLLM = {
    "logit_bias": None, "seed": None, "stop": [], "use_beam_search": False, "length_penalty": 1.0,
    "stop_token_ids": [], "min_tokens": 0, "truncate_prompt_tokens": None,
    "allowed_token_ids": None, "bad_words": [], "response_format": None, "detokenize": True,
    "ignore_eos": False, "request_id": "r-1", "session_id": None,
    "return_tokens_as_token_ids": None, "cache_salt": None, "kv_transfer_params": None,
    "vllm_xargs": None, "routed_experts_prompt_start": 0, "return_mm_kwargs": True,
    "mm_processor_kwargs": None, "stream_interval": None,
}  # fmt: skip
SGLANG = {
    "return_hidden_states": False, "return_routed_experts": False, "routed_experts_start_len": 0,
    "no_stop_trim": False, "lora_path": None, "session_params": None, "custom_params": None,
    "rid": None, "data_parallel_rank": None, "separate_reasoning": True, "stream_reasoning": True,
    "regex": None, "ebnf": None, "json_schema": None, "bootstrap_host": None,
}  # fmt: skip
LLAMA_CPP = {
    "cache_prompt": True, "id_slot": -1, "dynatemp_range": 0, "dynatemp_exponent": 1,
    "typical_p": 1, "xtc_probability": 0, "xtc_threshold": 0.1, "dry_multiplier": 0,
    "dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": -1, "repeat_penalty": 1.0,
    "repeat_last_n": -1, "mirostat": 0, "mirostat_tau": 5.0, "mirostat_eta": 0.1, "n_probs": 0,
    "min_keep": 0, "samplers": [], "timings_per_token": False, "reasoning_format": "auto",
    "n_predict": -1, "grammar": "",
}  # fmt: skip
OPENAI = {
    "store": True, "service_tier": "flex", "metadata": {"a": "b"}, "user": "u",
    "safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_retention": "24h",
    "prediction": {"type": "content", "content": "x"}, "verbosity": "low", "modalities": ["text"],
    "function_call": "none", "functions": [], "stream_options": {"include_usage": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, LMDEPLOY_CHAT),
        (COMPLETIONS, LMDEPLOY_COMPLETIONS),
        (CHAT, VLLM),
        (COMPLETIONS, VLLM),
        (CHAT, SGLANG),
        (COMPLETIONS, SGLANG),
        (CHAT, LLAMA_CPP),
        (COMPLETIONS, LLAMA_CPP),
        (CHAT, OPENAI),
        (CHAT, {"echo": False, "best_of": 1, "store": False}),
        (COMPLETIONS, {"echo": False, "best_of": 1, "suffix": ""}),
        ("/v1/chat/interactive", {"image_url": None, "adapter_name": None}),
        (CHAT, NEUTRAL_IN_CHAT),
        ("/v1/chat/interactive", NEUTRAL_IN_CHAT),
        (CHAT, {"of_tomorrow": None}),
        (COMPLETIONS, {"of_tomorrow": None}),
        ("/v1/chat/interactive", {"of_tomorrow": None}),
    ],
)
def test_a_clients_defaults_change_nothing(
    server: Running, path: str, body: dict[str, Any]
) -> None:
    plain, found = server.post(path, ROUTES[path]), server.post(path, {**ROUTES[path], **body})
    assert found.status == 200, found.error
    assert found.json.get("choices") == plain.json.get("choices") and found.json.get(
        "text"
    ) == plain.json.get("text")


def test_what_is_shared_stands_in_the_table_no_more() -> None:
    """Of a name that both bases of ChatRequest know, the one in the table would hold."""
    assert not set(Sampling.__annotations__) & set(REQUEST)


@pytest.mark.parametrize("model", [MessagesRequest, ResponsesRequest, InteractiveRequest])
def test_every_api_of_dialogues_knows_what_chat_completions_read(model: type[BaseModel]) -> None:
    assert set(ChatRequest.model_fields) <= set(model.model_fields)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("input_image", "images are not supported here; expected text"),
        ("input_audio", "audio is not supported here; expected text"),
        ("file", "files are not supported here; expected text"),
        ("wizard", "of type 'wizard' are not supported here; expected "),
    ],
)
def test_what_is_no_text_is_refused_in_the_same_words_everywhere(
    server: Running, kind: str, words: str
) -> None:
    said = [{"role": "user", "content": [{"type": kind, "text": "x"}]}]
    for path, body in (
        (CHAT, {"messages": said}),
        ("/v1/messages", {"messages": said, "max_tokens": 1}),
        ("/v1/responses", {"input": said}),
    ):
        answer = server.post(path, body)
        assert answer.status == 400 and words in answer.error["message"], answer.body


@pytest.mark.parametrize("path", ROUTES)
def test_every_other_value_is_refused_by_name(server: Running, path: str) -> None:
    formats = set(Constrained.__annotations__)
    own = {
        CHAT: {*formats, *Templated.__annotations__},
        COMPLETIONS: {*formats, "best_of", "echo", "add_special_tokens"},
    }.get(path, {"session_id"})
    names = [name for name, field in REQUEST.items() if field is not ANY and name not in own]
    assert len(names) > 100
    for name in names:
        answer = server.post(path, {**ROUTES[path], name: {"no": ["such"]}})
        assert (answer.status, answer.error["param"], answer.error["code"]) == (
            400,
            name,
            "unsupported_parameter",
        ), answer.error
        assert answer.error["message"].startswith(
            f"{name}: this value is not supported here; expected "
        )
    assert (
        server.post(path, {**ROUTES[path], "of_tomorrow": False}).error["code"]
        == "unknown_parameter"
    )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            {"use_beam_search": True},
            "use_beam_search: this value is not supported here; expected false",
        ),
        ({"use_beam_search": 0}, "expected false"),
        ({"length_penalty": 1.2}, "expected 1"),
        ({"functions": [{"name": "f"}]}, "expected []. Use tools"),
        ({"chat_template": "{{ 1 }}"}, "expected none. Use chat_template_kwargs"),
        (
            {"kwargs": {"min_tokens": 5}},
            "expected {}. Put what is in it beside the other parameters",
        ),
        ({"no_stop_trim": True}, "Use include_stop_str_in_output"),
    ],
)
def test_a_refusal_says_what_to_do(server: Running, body: dict[str, Any], words: str) -> None:
    answer = server.chat(**body)
    assert answer.status == 400 and words in answer.error["message"]


def test_the_document_tells_what_is_admitted(server: Running) -> None:
    schemas = server.get("/openapi.json").json["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest", "InteractiveRequest"):
        schema = schemas[name]
        assert schema["additionalProperties"] == {"type": "null"} and set(
            schema["properties"]
        ) >= set(REQUEST)
        assert schema["properties"]["use_beam_search"]["anyOf"] == [
            {"enum": [False]},
            {"type": "null"},
        ]


def test_the_smaller_of_both_limits_holds(server: Running) -> None:
    for first, second in ((5, 9), (9, 5)):
        body: Any = {"max_tokens": first, "max_completion_tokens": second, "ignore_eos": True}
        for answer in (server.chat(**body), server.complete(**body)):
            assert answer.json["usage"]["completion_tokens"] == 5


def test_min_new_tokens_is_min_tokens(server: Running) -> None:
    bias = {str(end): 100 for end in server.service.text.end_tokens}  # at once, unless it must wait
    plain = server.complete(logit_bias=bias, max_tokens=8).json["usage"]["completion_tokens"]
    for name in ("min_tokens", "min_new_tokens"):
        assert (
            server.complete(logit_bias=bias, max_tokens=8, **{name: 6}).json["usage"][
                "completion_tokens"
            ]
            >= 6
            > plain
        )


def test_stream_may_be_a_word(server: Running) -> None:
    """LMDeploy's own tests send it so."""
    assert server.complete(stream="true").events and server.complete(stream="false").json["choices"]
    assert server.complete(stream="yes").error["param"] == "stream"


# --- histories


@pytest.fixture(scope="module")
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.address}/v1", api_key="x", max_retries=0)


def tokens(server: Running, *messages: Any) -> list[int]:
    answer = server.post("/tokenize", {"messages": messages})
    assert answer.status == 200, answer.error
    return list(answer.json["tokens"])


def test_the_openai_clients_message_goes_back_as_it_came(server: Running, client: OpenAI) -> None:
    message = (
        client.chat.completions.create(model="m", messages=[HI], max_tokens=4).choices[0].message
    )  # type: ignore[list-item]
    assert None in message.model_dump().values()
    plain = tokens(server, HI, {"role": "assistant", "content": message.content}, HI)
    assert tokens(server, HI, message.model_dump(), HI) == plain
    again = client.chat.completions.create(model="m", messages=[HI, message, HI], max_tokens=4)  # type: ignore[list-item]
    assert again.usage and again.usage.prompt_tokens == len(plain)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the client's own
def test_so_does_a_parsed_one(server: Running, client: OpenAI) -> None:
    class Thing(BaseModel):
        name: str

    parsed = client.chat.completions.parse(
        model="m", messages=[HI], response_format=Thing, max_tokens=300, seed=1
    )  # type: ignore[list-item]
    message = parsed.choices[0].message
    assert message.model_dump()["parsed"]
    assert tokens(server, HI, message.model_dump(), HI) == tokens(
        server, HI, {"role": "assistant", "content": message.content}, HI
    )


def test_the_clients_stream_helper_adds_up_one_role(client: OpenAI) -> None:
    """It joins the texts of deltas, and a role is one: it says that it does, and only then other
    events than the first come without."""
    with client.chat.completions.stream(
        model="m", messages=[HI], max_tokens=300, temperature=0, stop=" is"
    ) as stream:  # type: ignore[list-item]
        assert stream.get_final_completion().choices[0].message.role == "assistant"


def test_every_delta_has_a_role(server: Running) -> None:
    events = server.chat(stream=True, n=2, temperature=1, seed=1).events
    assert {event["choices"][0]["delta"]["role"] for event in events} == {"assistant"}
    assert all(isinstance(event["choices"][0]["delta"]["content"], str) for event in events)


CALLED: dict[str, Any] = {
    "id": "c",
    "type": "function",
    "function": {"name": "f", "arguments": '{"x": 1}'},
}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "7"}


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (
            {
                "content": "A",
                **dict.fromkeys(
                    [*MESSAGE, "tool_calls", "refusal", "reasoning_content", "of_tomorrow"]
                ),
            },
            {"content": "A"},
        ),
        (
            {
                "content": "A",
                "annotations": [{"type": "url_citation"}],
                "parsed": {"a": 1},
                "provider_specific_fields": {},
            },
            {"content": "A"},
        ),
        (
            {
                "content": "A",
                "tool_calls": [],
                "images": [],
                "reasoning": "",
                "prefix": False,
                "id": "msg_1",
            },
            {"content": "A"},
        ),
        ({"content": None, "refusal": "No."}, {"content": "No."}),
        (
            {
                "content": [
                    {
                        "type": "text",
                        "text": "A",
                        "cache_control": {"type": "ephemeral"},
                        "annotations": [],
                    }
                ]
            },
            {"content": "A"},
        ),
        ({"content": "", "tool_calls": [{**CALLED, "index": 0}]}, {"tool_calls": [CALLED]}),
        (
            {"content": None, "tool_calls": [{**CALLED, **dict.fromkeys(CALL)}]},
            {"tool_calls": [CALLED]},
        ),
        (
            {
                "tool_calls": [
                    {**CALLED, "function": {**CALLED["function"], "parsed_arguments": {"x": 1}}}
                ]
            },
            {"tool_calls": [CALLED]},
        ),
    ],
)
def test_what_an_answer_carries_goes_back(
    server: Running, given: dict[str, Any], plain: dict[str, Any]
) -> None:
    rest = [RESULT, HI] if "tool_calls" in plain else [HI]
    assert tokens(server, HI, {"role": "assistant", **given}, *rest) == tokens(
        server, HI, {"role": "assistant", **plain}, *rest
    )


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"audio": {"id": "audio_1"}}, "messages[0].audio"),
        ({"function_call": {"name": "f", "arguments": "{}"}}, "messages[0].function_call"),
        ({"images": [{"url": "x"}]}, "messages[0].images"),
        ({"prefix": True}, "messages[0].prefix"),
    ],
)
def test_what_would_change_a_history_is_refused(
    server: Running, extra: dict[str, Any], param: str
) -> None:
    answer = server.chat(messages=[{"role": "assistant", "content": "A", **extra}, HI])
    assert (answer.status, answer.error["param"], answer.error["code"]) == (
        400,
        param,
        "unsupported_parameter",
    )
    unknown = server.chat(messages=[{"role": "user", "content": "A", "of_tomorrow": 1}])
    assert (unknown.error["param"], unknown.error["code"]) == (
        "messages[0].of_tomorrow",
        "unknown_parameter",
    )


def test_errors_of_the_client_name_the_parameter(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(
            model="m", messages=[HI], extra_body={"use_beam_search": True}
        )  # type: ignore[list-item]
    assert (wrong.value.param, wrong.value.code) == ("use_beam_search", "unsupported_parameter")
