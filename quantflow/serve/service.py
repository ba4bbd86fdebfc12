"""The engine as the routes see it: who may enter, whether it is well, and what its model is
called."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import cached_property, partial
from typing import Any

from quantflow.engine.admission import SHORTEN, TOO_LONG
from quantflow.engine.async_llm import AsyncLLM, Stream
from quantflow.engine.engine import Engine
from quantflow.engine.grammar import Grammar
from quantflow.engine.long_text import LONG, UNWANTED, Encoded, LongTexts
from quantflow.engine.request import Request, SamplingParams, Token
from quantflow.engine.text import Text
from quantflow.errors import Problem, contained
from quantflow.serve import body
from quantflow.serve.config import ServerConfig
from quantflow.serve.errors import Refused, shutting_down
from quantflow.serve.metrics import Metrics
from quantflow.serve.replies import ModelCard
from quantflow.serve.template_options import TemplateOptions
from quantflow.serve.tools import ToolFormat, tool_format
from quantflow.serve.wire import encode

RETRY_AFTER_S = 1
# of all streams together: one costs a small machine about a tenth of a millisecond of both its
# cores
SENDS_PER_S = 500.0
MOST_PAUSE_S = 0.05  # a reader sees no difference
NOTHING = TemplateOptions()


class Service:
    """llm: whose requests all come from here. draining: no new ones are taken; expired: those that
    still run are ended."""

    def __init__(self, llm: AsyncLLM, config: ServerConfig, default_name: str) -> None:
        engine = llm.engine
        self.llm, self.config = llm, config
        self.names = config.names or (default_name,)
        self.context = engine.room
        self.most_sequences = engine.config.max_batch_size
        self.metrics = Metrics(engine.occupancy, engine.blocks.size)
        self.began = int(time.time())
        self.inside = 0  # sequences of requests that have entered
        self.draining = False
        self.expired = asyncio.Event()
        # A pool for each kind of work, so that one cannot keep the others waiting.
        pools = (ThreadPoolExecutor(n, thread_name_prefix="quantflow") for n in (4, 1, 2, 1, 1))
        self._texts, self._asides, self._larges, self._compilations, self._answers = self._pools = (
            tuple(pools)
        )

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def text(self) -> Text:
        """Raises Refused for a model without a tokenizer."""
        text = self.llm.engine.text
        if text is None:
            raise Refused(
                400,
                "prompt: text, and the model has no tokenizer; expected token ids",
                param="prompt",
                code="no_tokenizer",
            )
        return text

    @property
    def tools(self) -> ToolFormat | None:
        text = self.llm.engine.text
        return tool_format(text.template) if text else None

    def cards(self) -> list[ModelCard]:
        return [
            ModelCard(id=name, created=self.began, max_model_len=self.context)
            for name in self.names
        ]

    def check_model(self, name: str | None) -> None:
        """Raises Refused for a name that the model does not have. Where none was given to the
        server, it answers to all."""
        if name is not None and self.config.names and name not in self.names:
            message = (
                f"The model {name[:80]!r} does not exist: expected one of"
                f" {', '.join(map(repr, self.names))}"
            )
            raise Refused(404, message, param="model", code="model_not_found")

    @property
    def health(self) -> str:
        """ok, or what is the matter: stopped, stalled, draining."""
        if not self.llm.alive:
            return "stopped"
        if time.monotonic() - self.llm.progress > self.config.stall_s:
            return "stalled"
        return "draining" if self.draining else "ok"

    @property
    def pause_s(self) -> float:
        """How long a stream gathers tokens between two events: hardly at all where few run; many
        would spend the machine on sending."""
        return min(MOST_PAUSE_S, self.inside / SENDS_PER_S)

    @contextmanager
    def entered(self, sequences: int) -> Iterator[None]:
        """For as long as a request is in the house. Raises Refused where there is no room, or the
        house is closing."""
        most = self.most_sequences + self.config.max_queue
        if self.draining:
            raise shutting_down()
        if sequences > most:
            raise Refused(
                400,
                f"n: {sequences} texts in all; expected at most {most}",
                param="n",
                code="invalid_value",
            )
        if self.inside + sequences > most:
            message = f"the queue is full ({self.inside} texts run or wait): try again"
            raise Refused(
                429, message, code="queue_full", headers={"retry-after": str(RETRY_AFTER_S)}
            )
        self.inside += sequences
        try:
            yield
        finally:
            self.inside -= sequences

    async def open(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        whole: bool,
        priority: int = 0,
        submit: Callable[[Engine], Request] | None = None,
        arrived: asyncio.Event | None = None,
    ) -> list[Stream]:
        """The requests, all submitted, or none of them, and listened to by the metrics. submit: in
        place of the engine's own, for the one prompt there is. arrived: see `Stream`. Raises
        RequestError, ResourceError."""

        def begin(engine: Engine) -> list[Request]:
            return (
                engine.submit_all(prompts, params, priority=priority)
                if submit is None
                else [submit(engine)]
            )

        streams = await self.llm.open_by(
            begin, whole=whole, hear=partial(self._counting, time.monotonic()), arrived=arrived
        )
        self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
        return streams

    def _counting(self, began: float) -> Callable[[Token], None]:
        metrics, last = self.metrics, dict[int, float]()

        def hear(token: Token) -> None:
            now = time.monotonic()
            if token.token is not None:
                metrics.tokens.inc()
                if token.index in last:
                    metrics.between.observe(now - last[token.index])
                elif not last:
                    metrics.first.observe(now - began)
                    metrics.cached_tokens.inc(token.cached)
                last[token.index] = now
            if token.finish:
                metrics.finished.labels(str(token.finish)).inc()
                metrics.whole.observe(now - began)

        return hear

    async def prepare(self, work: Callable[[], Any]) -> Any:
        """What `work` gives, done beside the loop: tokenising takes a while. Where nobody waits any
        longer, it is not begun, or its long text is given up. That of large requests waits in a
        line of its own, so that it keeps nobody else waiting."""
        return await self._beside(self._texts, work)

    async def prepare_aside(self, work: Callable[[], Any]) -> Any:
        """The same for what generates nothing, so that generation does not wait for it."""
        return await self._beside(self._asides, work)

    async def put_together(self, work: Callable[[], Any]) -> Any:
        """The same for an answer that is large."""
        return await _done(self._answers, work)

    async def _beside(self, pool: ThreadPoolExecutor, work: Callable[[], Any]) -> Any:
        pool = self._larges if body.size.get() > body.LARGE else pool
        return await _done(pool, work)

    async def compile(self, grammar: Grammar | None) -> None:
        """Makes a grammar ready. Raises RequestError where it is none, or too much."""
        grammars = self.llm.engine.grammars
        if grammar is not None and grammars is not None:
            await _done(self._compilations, partial(grammars.matcher, grammar))

    def close(self) -> None:
        """What has not begun never will."""
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)

    def encode(self, prompts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Tokens of prompts. special: see `Text.encode`. Raises Refused for one that is too long,
        before it is tokenised where that is certain, and RequestError."""
        # as the engine calls them
        names = ["prompt"] if len(prompts) == 1 else [f"prompt[{i}]" for i in range(len(prompts))]
        for name, prompt in zip(names, prompts, strict=True):
            self._check_characters(name, len(prompt))
        return self._fitting(prompts, names, special=special)

    def dialogue(
        self, messages: list[dict[str, Any]], options: TemplateOptions = NOTHING
    ) -> list[int]:
        """The tokens of messages as templates want them. Raises RequestError, and Refused where
        they are too long."""
        return self.prompt_of(for_templates(messages), options)

    def prompt_of(
        self, messages: list[dict[str, Any]], options: TemplateOptions = NOTHING
    ) -> list[int]:
        """The same of messages in the words of templates: see `for_templates`."""
        characters = sum(len(m.get(name, "")) for m in messages for name in ("content", *REASONING))
        self._check_characters(
            "messages",
            characters
            + sum(len(text) for d in options.variables.get("documents", ()) for text in d.values()),
        )
        return self._fitting(
            [self._rendered(messages, options)],
            ["messages"],
            special=False,
            literal=self.config.literal_content,
        )[0]

    def tokens(self, prompts: Sequence[str], *, special: bool) -> Encoded:
        """The tokens of prompts of any length. Raises RequestError."""
        return self._encoded(prompts, special=special)

    def dialogue_tokens(
        self, dialogues: Sequence[list[dict[str, Any]]], options: TemplateOptions = NOTHING
    ) -> Encoded:
        """The same of dialogues, each up to where its answer begins."""
        prompts = [self._rendered(for_templates(messages), options) for messages in dialogues]
        return self._encoded(prompts, special=False, literal=self.config.literal_content)

    def decode(self, tokens: list[int]) -> bytes:
        """The text of tokens, special ones left out: a JSON string. Raises RequestError."""
        return (
            encode(self.text.decode(tokens))
            if len(tokens) <= LONG
            else self._long_texts.decode(tokens)
        )

    def _rendered(self, messages: list[dict[str, Any]], options: TemplateOptions) -> str:
        return self.text.render(
            messages,
            options.variables,
            tools=options.tools,
            add_generation_prompt=options.add_generation_prompt,
            continued=options.continued,
            literal=self.config.literal_content,
        )

    @cached_property
    def _long_texts(self) -> LongTexts:
        return LongTexts(
            self.text.tokenizer, self.text.templates if self.config.literal_content else None
        )

    def _fitting(
        self, prompts: Sequence[str], names: Sequence[str], *, special: bool, literal: bool = False
    ) -> list[list[int]]:
        """names: what a client calls each."""
        encoded = self._encoded(prompts, special=special, literal=literal, most=self.context)
        for name, count in zip(names, encoded.counts, strict=True):
            if count > self.context:
                raise self._too_long(name, f"{count} tokens")
        return encoded.ids

    def _encoded(
        self,
        prompts: Sequence[str],
        *,
        special: bool,
        literal: bool = False,
        most: int | None = None,
    ) -> Encoded:
        """Where all of them together are short, a process of their own would take longer."""
        if sum(map(len, prompts)) > LONG:
            return self._long_texts.encode(prompts, special=special, literal=literal, most=most)
        ids = [self.text.encode(text, special=special, literal=literal) for text in prompts]
        return Encoded([*map(len, ids)], encode(ids))

    def _check_characters(self, param: str, characters: int) -> None:
        """Raises Refused where even the longest tokens would be too many."""
        if characters > self.context * self.text.longest:
            raise self._too_long(param, f"{characters} characters")

    def _too_long(self, param: str, size: str) -> Refused:
        problem = Problem(
            param, size, f"fewer than {self.context} tokens, {self.llm.engine.room_is}", SHORTEN
        )
        return Refused(400, str(problem), param=param, code=TOO_LONG)


async def _done(pool: ThreadPoolExecutor, work: Callable[[], Any]) -> Any:
    """What `work` gives, done by the pool. Who is cancelled leaves nothing in its queue but a
    place: what waits there may be large."""
    held, unwanted, context = [work], threading.Event(), copy_context()
    del work
    context.run(UNWANTED.set, unwanted)
    try:
        return await asyncio.get_running_loop().run_in_executor(
            pool, context.run, lambda: contained(held.pop())
        )
    except asyncio.CancelledError:
        unwanted.set()
        held.clear()
        raise


REASONING = ("reasoning_content", "reasoning", "thinking")


def for_templates(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in the words that templates know. Raises Refused."""
    calls = (call for message in messages for call in message.get("tool_calls") or ())
    body.check_texts((call["function"]["arguments"] for call in calls), "messages")
    return [_for_template(message) for message in messages]


def _for_template(message: dict[str, Any]) -> dict[str, Any]:
    """A message in the words that templates know: text in one piece, arguments as objects,
    `developer` as `system`, and nothing that is there but empty."""
    content = message.get("content")
    content = (
        content if isinstance(content, str) else "".join(part["text"] for part in content or ())
    )
    result = {"role": message["role"], "content": content or message.get("refusal") or ""}
    if result["role"] == "developer":
        result["role"] = "system"
    result |= {
        name: message[name] for name in ("name", "tool_call_id", *REASONING) if message.get(name)
    }
    if message.get("tool_calls"):
        result["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    return result


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        wrong = f"messages: tool_calls with arguments {function['arguments'][:80]!r}; expected JSON"
        raise Refused(400, wrong, param="messages", code="invalid_value") from None
    return {
        "id": call["id"],
        "type": call["type"],
        "function": {"name": function["name"], "arguments": arguments},
    }
