"""/v1/chat/completions: a dialogue in, the assistant's message out."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from quantflow.engine.request import Finish, Output, SamplingParams, Token
from quantflow.serve.answer import Job, Shape, Usage
from quantflow.serve.errors import Refused, renaming
from quantflow.serve.grammars import constraint
from quantflow.serve.requests import ChatRequest
from quantflow.serve.sampling import chat_logprobs, prompt_logprobs, sampling_params, stream_usage
from quantflow.serve.service import Service
from quantflow.serve.template_options import TemplateOptions, template_options
from quantflow.serve.tool_use import ToolUse, choice_of, tool_use
from quantflow.serve.tools import Call, Reading, ToolFormat, apart
from quantflow.serve.wire import Object


class ChatShape(Shape):
    """tools: how calls are read out of the text; None: they are not. most_calls: those after are
    dropped. usage: whether the last event tells it. roles: whether every event says whose words
    they are, as LMDeploy's do, or the first alone. ids: the prompt's tokens, where tokens are told.
    scores: how many alternatives are told of each token of the prompt; None: nothing of them."""

    def __init__(
        self,
        service: Service,
        sequences: int,
        *,
        tools: ToolFormat | None,
        most_calls: int | None,
        logprobs: bool,
        usage: bool,
        roles: bool,
        ids: list[int] | None = None,
        scores: int | None = None,
    ) -> None:
        self._role = {"role": "assistant"} if roles else {}
        self._ids, self._scores = ids, scores
        self._service, self._sequences, self._logprobs, self._with_usage = (
            service,
            sequences,
            logprobs,
            usage,
        )
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.name,
        }
        self._reading = [Reading(tools, most_calls) for _ in range(sequences)]

    def start(self) -> Iterable[Object]:
        for index in range(self._sequences):
            chunk = self._chunk(index, {"role": "assistant", "content": ""})
            yield chunk if index or self._ids is None else {**chunk, "prompt_token_ids": self._ids}

    def more(self, text: int, tokens: list[Token]) -> Iterable[Object]:
        ended, stop = tokens[-1].finish, tokens[-1].stop
        shown, calls = apart(
            self._reading[text].add("".join(token.text for token in tokens), last=ended is not None)
        )
        scored = [token.logprob for token in tokens if token.logprob] if self._logprobs else []
        ids = (
            None
            if self._ids is None
            else [token.token for token in tokens if token.token is not None]
        )
        if shown or scored or ids:
            yield self._chunk(
                text,
                {"content": shown},
                chat_logprobs(self._service.text, scored) if self._logprobs else None,
                ids=ids,
            )
        for number, call in enumerate(calls, self._reading[text].calls - len(calls)):
            yield self._chunk(text, {"tool_calls": [{"index": number, **_called(call)}]})
        if ended is not None:
            chunk = self._chunk(text, {"content": ""}, finish=self._finish(text, ended))
            chunk["choices"][0]["stop_reason"] = stop
            yield chunk

    def end(self, usage: Usage) -> Iterable[Object]:
        if self._with_usage:
            yield {
                **self._head,
                "object": "chat.completion.chunk",
                "choices": [],
                "usage": usage.body,
            }

    def whole(self, outputs: list[Output], usage: Usage) -> Object:
        choices: list[Object] = []
        for completion in outputs[0].completions:
            shown, calls = apart(self._reading[completion.index].add(completion.text, last=True))
            message: Object = {
                "role": "assistant",
                "content": shown if shown or not calls else None,
                "refusal": None,
            }
            if calls:
                message["tool_calls"] = [_called(call) for call in calls]
            choices.append(
                {
                    "index": completion.index,
                    "message": message,
                    "logprobs": chat_logprobs(self._service.text, completion.logprobs)
                    if self._logprobs
                    else None,
                    "finish_reason": self._finish(completion.index, completion.finish),
                    "stop_reason": completion.stop,
                }
            )
            if self._ids is not None:
                choices[-1]["token_ids"] = list(completion.token_ids)
        body: Object = {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage.body,
        }
        if self._ids is not None:
            body["prompt_token_ids"] = self._ids
        if self._scores is not None:
            body["prompt_logprobs"] = prompt_logprobs(
                self._service.text, outputs[0].prompt_logprobs, self._scores
            )
        return body

    def _finish(self, index: int, finish: Finish) -> str:
        return "tool_calls" if self._reading[index].calls and finish == Finish.stop else str(finish)

    def _chunk(
        self,
        index: int,
        delta: Object,
        logprobs: Object | None = None,
        finish: str | None = None,
        ids: list[int] | None = None,
    ) -> Object:
        choice: Object = {
            "index": index,
            "delta": self._role | delta,
            "logprobs": logprobs,
            "finish_reason": finish,
        }
        if ids is not None:
            choice["token_ids"] = ids
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return {**chunk, "usage": None} if self._with_usage else chunk


def _called(call: Call) -> Object:
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


@dataclass(frozen=True)
class Plan:
    """What a dialogue asks of the engine. tools: how calls are read out of the answer; None: they
    are not. most_calls: those after are dropped. grammar_from: the parameter that the grammar was
    made of."""

    prompt: list[int]
    params: SamplingParams
    tools: ToolFormat | None
    most_calls: int | None
    grammar_from: str


def chat_job(service: Service, body: ChatRequest, *, roles: bool = True) -> Job:
    """Takes a while: tokenises. roles: see `ChatShape`. Raises Refused, RequestError."""
    asked = plan(service, body)
    shape = ChatShape(
        service,
        asked.params.n,
        tools=asked.tools,
        most_calls=asked.most_calls,
        logprobs=bool(body.logprobs),
        usage=stream_usage(body.stream_options),
        roles=roles,
        ids=asked.prompt if body.return_token_ids else None,
        scores=body.prompt_logprobs,
    )
    return Job(
        [asked.prompt],
        asked.params,
        shape,
        bool(body.stream),
        grammar_from=asked.grammar_from,
        priority=body.priority or 0,
    )


def plan(service: Service, body: ChatRequest) -> Plan:
    """The same for every API that speaks of dialogues. Takes a while: tokenises. Raises Refused,
    RequestError."""
    service.check_model(body.model)
    if body.top_logprobs and not body.logprobs:
        raise Refused(
            400,
            "top_logprobs: without logprobs; expected logprobs: true",
            param="top_logprobs",
            code="invalid_value",
        )
    use = _tool_use(service, body)
    wanted = use.constraint
    with renaming({"grammar": wanted.source}):
        params = sampling_params(
            body,
            grammar=wanted.grammar,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
    if use.format:
        params = replace(params, skip_special_tokens=False)
    prompt = service.dialogue(_messages(body), _template_options(body, use))
    return Plan(prompt, params, use.format, use.most_calls, wanted.source)


def count(service: Service, body: ChatRequest) -> int:
    """Tokens of the prompt, be they more than the context holds. Takes a while. Raises Refused,
    RequestError."""
    service.check_model(body.model)
    return service.dialogue_tokens(
        [_messages(body)], _template_options(body, _tool_use(service, body))
    ).counts[0]


def _tool_use(service: Service, body: ChatRequest) -> ToolUse:
    functions = [tool.function for tool in body.tools or ()]
    parallel = body.parallel_tool_calls is not False
    return tool_use(
        service, functions, choice_of(body.tool_choice), parallel=parallel, answer=constraint(body)
    )


def _messages(body: ChatRequest) -> list[Object]:
    return [m.model_dump(exclude_none=True) for m in body.messages]


def _template_options(body: ChatRequest, use: ToolUse) -> TemplateOptions:
    return template_options(body, body.messages, list(use.functions))
