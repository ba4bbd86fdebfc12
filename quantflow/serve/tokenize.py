"""vLLM's doors for tokens: /tokenize, those of a text, or of a dialogue up to where its answer
begins, and /detokenize."""

from __future__ import annotations

from quantflow.serve import fields
from quantflow.serve.errors import Refused
from quantflow.serve.requests import DetokenizeRequest, Templated, TokenizeRequest
from quantflow.serve.service import Service
from quantflow.serve.template_options import template_options

OF_DIALOGUES = tuple(Templated.__annotations__)
OF_TEXTS = ("add_special_tokens",)


def tokenized(service: Service, body: TokenizeRequest) -> bytes:
    """What is answered, as JSON. Takes a while. Raises Refused, RequestError."""
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise Refused(
            400,
            "prompt: expected it or messages, one of the two",
            param="prompt",
            code="invalid_value",
        )
    _check_neutral(body)
    if body.messages is not None:
        result = service.dialogue_tokens(
            [[m.model_dump(exclude_none=True) for m in body.messages]],
            template_options(body, body.messages),
        )
    else:
        result = service.tokens([body.prompt or ""], special=body.add_special_tokens is not False)
    return b'{"tokens":%b,"count":%d,"max_model_len":%d}' % (
        result.json[1:-1],
        result.counts[0],
        service.context,
    )


def detokenized(service: Service, body: DetokenizeRequest) -> bytes:
    """The same of /detokenize."""
    service.check_model(body.model)
    vocabulary = service.llm.engine.model_config.vocabulary
    if (largest := max(body.tokens, default=0)) >= vocabulary:
        message = f"tokens: {largest}; expected ids from 0 to {vocabulary - 1}"
        raise Refused(400, message, param="tokens", code="invalid_value")
    return b'{"prompt":%b}' % service.decode(body.tokens)


def _check_neutral(body: TokenizeRequest) -> None:
    """Raises Refused for what only counts with the other of the two: /v1/completions and
    /v1/chat/completions refuse the same."""
    for name in OF_TEXTS if body.prompt is None else OF_DIALOGUES:
        if wrong := fields.wrong(fields.REQUEST[name], getattr(body, name)):
            raise Refused(400, f"{name}: {wrong}", param=name, code=fields.REFUSED)
