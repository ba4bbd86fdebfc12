"""What users of Python see: a model that generates, chats and streams.

from quantflow import LLM, SamplingParams

llm = LLM("artifacts/internlm7b_w4_kv8")
print(llm.chat([{"role": "user", "content": "Hello!"}], SamplingParams(max_tokens=64)).text)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

from quantflow.engine.config import EngineConfig
from quantflow.engine.engine import Engine
from quantflow.engine.request import (
    Completion,
    Finish,
    Logprob,
    Output,
    Request,
    SamplingParams,
    Token,
)
from quantflow.engine.text import Message
from quantflow.errors import Problem, ResourceError

Prompt = str | Many[int]


class Collector:
    """A request's tokens as they come, and the output they make."""

    def __init__(self, request: Request) -> None:
        self.request = request
        count = request.params.n
        self._tokens: list[list[int]] = [[] for _ in range(count)]
        self._texts: list[list[str]] = [[] for _ in range(count)]
        self._logprobs: list[list[Logprob]] = [[] for _ in range(count)]
        self._ends: list[Token | None] = [None] * count
        self._prompt: tuple[Logprob | None, ...] = ()
        self._cached = 0

    @property
    def done(self) -> bool:
        return all(self._ends)

    def add(self, token: Token) -> None:
        if token.token is not None:
            self._tokens[token.index].append(token.token)
        self._texts[token.index].append(token.text)
        if token.logprob:
            self._logprobs[token.index].append(token.logprob)
        self._cached = max(self._cached, token.cached)
        if token.prompt_logprobs:
            self._prompt = token.prompt_logprobs
        if token.finish:
            self._ends[token.index] = token

    def output(self) -> Output:
        completions = []
        for index, end in enumerate(self._ends):
            finish, reason, stop = (
                (end.finish or Finish.abort, end.reason, end.stop)
                if end
                else (Finish.abort, "", None)
            )
            text, logprobs = "".join(self._texts[index]), tuple(self._logprobs[index])
            completions.append(
                Completion(index, tuple(self._tokens[index]), text, finish, reason, logprobs, stop)
            )
        return Output(
            self.request.id, self.request.prompt, tuple(completions), self._prompt, self._cached
        )


class LLM:
    """A model, loaded to be run.

    Args:
        model: An artifact, a checkpoint in a format that is read, or a hub id.
        options: Those of `EngineConfig`, such as `device`, `kv`, `session_len` (tokens) and `tp`.

    Raises:
        UserError: For a model that cannot be run, and options that make no sense.
        ResourceError: Where the machine has not enough memory.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self.engine = Engine(model, EngineConfig(**options))
        # a step's tokens may be for another stream than the one that stepped
        self._inboxes: dict[str, deque[Token]] = {}

    def generate(
        self,
        prompts: Prompt | Many[Prompt],
        params: SamplingParams | Many[SamplingParams] | None = None,
    ) -> list[Output]:
        """What the model makes of each prompt; all of them run together.

        Args:
            prompts: Texts, or lists of token ids; one of them, or many.
            params: One for all, or one each; greedy by default.

        Returns:
            An output a prompt, in their order.

        Raises:
            RequestError: For what cannot be served, before anything runs.
            ResourceError: Where memory runs out.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        many: Many[Prompt] = [prompts] if single else prompts  # type: ignore[list-item, assignment]
        collectors = {
            request.id: Collector(request) for request in self.engine.submit_all(many, params)
        }
        self._inboxes |= {id: deque() for id in collectors}
        try:
            for id, collector in collectors.items():
                while not collector.done:
                    collector.add(self._next(id))
        finally:
            for id in collectors:  # what is left after an interruption or an error
                self._leave(id)
        return [_checked(collector.output()) for collector in collectors.values()]

    def chat(self, messages: Many[Message], params: SamplingParams | None = None) -> Output:
        """The model's answer to a dialogue, in its own dialogue format.

        Args:
            messages: The dialogue, a list of `{"role": …, "content": …}`.
            params: As in `generate`.

        Returns:
            The answer.

        Raises:
            RequestError: For what cannot be served; ResourceError as in `generate`.
        """
        return self.generate([self.engine.tokenizer.dialogue(messages)], params)[0]

    def get_prompt(self, query: str) -> str:
        """A question wrapped in the model's dialogue format."""
        return self.engine.tokenizer.render([{"role": "user", "content": query}])

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, session: int | None = None
    ) -> Iterator[Token]:
        """The tokens and their text as they come. Leaving the loop aborts the request.

        Args:
            prompt: A text, or token ids.
            params: As in `generate`.
            session: A number; the next prompt with the same one goes on from this one's end.

        Yields:
            A token, the text that it adds, and of the last one why the text ended.

        Raises:
            RequestError: For what cannot be served.
            ResourceError: Where a text could not be finished.
        """
        request = self.engine.submit(prompt, params, session=session)
        self._inboxes[request.id] = deque()
        open_texts = request.params.n
        try:
            while open_texts:
                token = self._next(request.id)
                open_texts -= token.finish is not None
                if token.finish and token.finish.failed:
                    raise ResourceError(Problem(request.id, token.reason))
                yield token
        finally:
            self._leave(request.id)

    def _next(self, id: str) -> Token:
        """A request's next token, after as many steps as it takes."""
        inbox = self._inboxes[id]
        while not inbox:
            for token in self.engine.step():
                if token.request in self._inboxes:
                    self._inboxes[token.request].append(token)
        return inbox.popleft()

    def _leave(self, id: str) -> None:
        self.engine.abort(id)
        del self._inboxes[id]

    def stream_infer(
        self, session_id: int, input_ids: Many[int], params: SamplingParams | None = None
    ) -> Iterator[list[int]]:
        """The generated token ids so far, a longer list at every step, as LMDeploy's `stream_infer`
        yields them; the session goes on from its last turn."""
        tokens: list[int] = []
        for token in self.stream(list(input_ids), params, session=session_id):
            if token.token is not None:
                tokens.append(token.token)
                yield list(tokens)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids. special: with the tokens that open every text, where the model has them."""
        return self.engine.tokenizer.encode(text, special=special)

    def decode(self, tokens: Many[int]) -> str:
        """The text of token ids."""
        return self.engine.tokenizer.decode(tokens)


def _checked(output: Output) -> Output:
    failed = [c for c in output.completions if c.finish.failed]
    if failed:
        raise ResourceError([Problem(f"{output.id} text {c.index}", c.reason) for c in failed])
    return output
