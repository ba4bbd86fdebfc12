"""What may be queued: a request's arguments, held against the model and the cache.

A request that passes can always be served, if it must run alone: so the scheduler needs no way to
refuse one.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace
from pathlib import Path

from quantflow.engine.block_manager import BlockManager
from quantflow.engine.grammar import Grammars, Matcher
from quantflow.engine.request import SamplingParams
from quantflow.engine.scheduler import Limits
from quantflow.engine.sessions import Session, Sessions
from quantflow.engine.text import Text
from quantflow.errors import Problem, RequestError

TOO_LONG = "context_length_exceeded"  # the code of a request that the context cannot hold
# the words that clients know it by who see no code: they leave out what was said long ago
SHORTEN = "The prompt is too long"


@dataclass(frozen=True)
class Admitted:
    """A request that can be queued. tokens: the session's history, of `history` tokens, and the
    prompt. id: None: any."""

    tokens: tuple[int, ...]
    history: int
    params: SamplingParams
    id: str | None
    priority: int
    session: int | None
    matcher: Matcher | None


@dataclass(frozen=True)
class Admission:
    """What one model and its cache can serve. folder: the model's, for messages. text, grammars:
    None for a model without a tokenizer. vocabulary: how many token ids the model has. running: ids
    of requests."""

    folder: Path
    text: Text | None
    grammars: Grammars | None
    vocabulary: int
    limits: Limits
    blocks: BlockManager
    sessions: Sessions
    running: Container[str | None]

    @property
    def room(self) -> int:
        """Tokens that one sequence may have, its answer included: the context, or what the cache
        holds where that is less."""
        return min(self.limits.context, self.blocks.count * self.blocks.size)

    @property
    def room_is(self) -> str:
        """What `room` comes from, for messages."""
        return (
            "the model's context" if self.room == self.limits.context else "what the KV cache holds"
        )

    @property
    def tokenizer(self) -> Text:
        """Raises RequestError for a model without one."""
        if self.text is None:
            expected = (
                "tokenizer.json, tokenizer.model, vocab.json or qwen.tiktoken, to read text with"
            )
            hint = (
                "Put the tokenizer's files beside the weights; without them, prompts are token ids"
                " (in Python, or over HTTP)"
            )
            raise RequestError(Problem(str(self.folder), "no tokenizer", expected, hint))
        return self.text

    def admit(
        self,
        prompt: str | Tokens[int],
        params: SamplingParams,
        id: str | None,
        priority: int,
        session: int | None,
    ) -> Admitted:
        """Changes nothing. Raises RequestError with all that is wrong."""
        if problems := [*_of_wrong_kind(prompt, id, priority, session)]:
            raise RequestError(problems)
        if isinstance(prompt, str):
            begun = session is not None and self.sessions.get(session, Session()).tokens
            prompt = self.tokenizer.encode(prompt, special=not begun)
        history = self._history(session, params)
        tokens = (*history, *prompt)
        if problems := self.problems(tokens, params, id):
            raise RequestError(problems)
        return Admitted(tokens, len(history), params, id, priority, session, self._matcher(params))

    def admit_all(
        self,
        prompts: Tokens[str | Tokens[int]],
        params: SamplingParams | Tokens[SamplingParams] | None,
        priority: int,
    ) -> list[Admitted]:
        """The same of several requests: all of them can be queued. params: one for all, or one
        each."""
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            expected = f"one, or {len(prompts)}: one a prompt"
            raise RequestError(Problem("params", f"{len(params)} of them", expected))
        admitted, problems = list[Admitted](), dict[Problem, None]()
        for at, (prompt, its) in enumerate(zip(prompts, params, strict=True)):
            try:
                admitted.append(self.admit(prompt, its, None, priority, None))
            except RequestError as error:
                # which prompt it is; of the rest, all have the same problem
                problems |= dict.fromkeys(
                    replace(p, where=f"prompt[{at}]") if p.where == "prompt" and prompts[1:] else p
                    for p in error.problems
                )
        if problems:
            raise RequestError(list(problems))
        return admitted

    def problems(
        self, tokens: tuple[int, ...], params: SamplingParams, id: str | None
    ) -> list[Problem]:
        """What stands against a request of these tokens, its history among them."""
        problems = []
        if id in self.running:
            problems.append(Problem("id", repr(id), "an id that no running request has"))
        problems += self._of_length(len(tokens), params)
        problems += self._of_ids(tokens, params)
        if params.prompt_logprobs_from and params.prompt_logprobs_from >= len(tokens):
            expected = f"less than the prompt's {len(tokens)} tokens"
            problems.append(
                Problem("prompt_logprobs_from", str(params.prompt_logprobs_from), expected)
            )
        if params.n > self.limits.sequences:
            expected = f"at most {self.limits.sequences}, the sequences that run at once"
            problems.append(Problem("n", str(params.n), expected))
        problems += self._of_stops(params)
        return problems

    def _of_length(self, length: int, params: SamplingParams) -> Iterator[Problem]:
        room, why = self.room, self.room_is
        if not length:
            yield Problem("prompt", "no tokens", "at least one")
        if params.max_tokens == 0:
            if not 2 <= length <= room + 1:
                expected = f"2 to {room + 1}: {why} is {room}"
                code = TOO_LONG if length > 2 else ""
                yield Problem("prompt", f"{length} tokens to score", expected, code=code)
        elif length >= room:
            expected = f"fewer than {room}, {why}"
            yield Problem("prompt", f"{length} tokens", expected, SHORTEN, TOO_LONG)
        elif params.max_tokens is not None and length + params.max_tokens > room:
            asked = f"{params.max_tokens} after a prompt of {length} tokens"
            expected = f"at most {room - length}: {why} is {room}"
            yield Problem("max_tokens", asked, expected, code=TOO_LONG)

    def _of_ids(self, tokens: tuple[int, ...], params: SamplingParams) -> Iterator[Problem]:
        """Ids that the model has not; of a prompt that is too long, nobody wants to hear."""
        for where, ids in (
            ("prompt", tokens if len(tokens) <= self.room + 1 else ()),
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ):
            unknown = sorted({t for t in ids if not 0 <= t < self.vocabulary})
            if unknown:
                yield Problem(where, f"token {unknown[0]}", f"ids from 0 to {self.vocabulary - 1}")

    def _of_stops(self, params: SamplingParams) -> Iterator[Problem]:
        if params.stop and self.text is None:
            yield Problem("stop", "strings, and the model has no tokenizer", "stop_token_ids")
        hidden = [
            stop for stop in params.stop if params.skip_special_tokens and self._never_shown(stop)
        ]
        if hidden:
            expected = "text: a special token is never shown as such"
            yield Problem("stop", repr(hidden[0]), expected, "Name it in stop_token_ids")

    def _never_shown(self, stop: str) -> bool:
        """Whether a stop string is the name of a token that texts leave out."""
        if self.text is None:
            return False
        token = self.text.tokenizer.token_to_id(stop)
        return token is not None and self.text.decode([token]) == ""

    def _history(self, number: int | None, params: SamplingParams) -> list[int]:
        """The tokens of the session that the prompt goes on from."""
        if number is None:
            return []
        session = self.sessions.get(number, Session())
        if session.turn is not None:
            expected = "one turn at a time"
            raise RequestError(Problem(f"session {number}", "a turn is running", expected))
        if params.n > 1:
            expected = "1 in a session, which goes on from one text"
            raise RequestError(Problem("n", str(params.n), expected))
        if params.max_tokens == 0:
            expected = "at least 1 in a session, which goes on from its text"
            raise RequestError(Problem("max_tokens", "0", expected))
        return session.tokens

    def _matcher(self, params: SamplingParams) -> Matcher | None:
        if params.grammar is None:
            return None
        if self.grammars is None:
            expected = "one that tells what a token says"
            raise RequestError(Problem("grammar", "a model without a tokenizer", expected))
        return self.grammars.matcher(params.grammar)


def _of_wrong_kind(
    prompt: object, id: object, priority: object, session: object
) -> Iterator[Problem]:
    """Arguments that are not what they are typed as."""
    if not isinstance(prompt, str):
        items = prompt if isinstance(prompt, (list, tuple)) else None
        if items is None or not all(isinstance(t, int) and not isinstance(t, bool) for t in items):
            yield Problem("prompt", repr(prompt)[:80], "text, or a list of token ids")
    if not (id is None or isinstance(id, str)):
        yield Problem("id", repr(id)[:80], "text")
    for name, value in (("priority", priority), ("session", session)):
        if value is None and name == "session":
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            yield Problem(name, repr(value)[:80], "an integer")
