"""/v1/chat/interactive: dialogues that the server remembers, as LMDeploy keeps them, by number.

The messages are kept here, their keys and values in the engine's session of the same dialogue. A
turn renders the whole dialogue again and goes on from where it agrees with what the engine holds: a
template may well write an old turn differently. A session belongs to the key that opened it: the
same number under another key is another session.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass

from quantflow.engine.engine import Engine
from quantflow.engine.request import Finish, Output, Request, SamplingParams, Token
from quantflow.serve.answer import Job, Shape, Usage
from quantflow.serve.errors import Refused, aborted
from quantflow.serve.requests import InteractiveRequest
from quantflow.serve.service import Service, for_templates
from quantflow.serve.wire import Object

MOST_SESSIONS = 1024
# Bytes of a session's messages, for each token of the model's context and beside them. What a
# template shows fits the context; what it leaves out, an old turn's thoughts, say, does not count
# there.
MOST_PER_TOKEN, MOST_BESIDE = 32, 65536
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Conversation:
    """number: of the engine's session. messages: a list, as templates want them, in JSON; nothing
    else of them is kept. used: when it was, on the monotonic clock. tokens: of the dialogue so far.
    ended: what the turn that runs hears, and one that is prepared, which must not begin, where its
    owner or an administrator ended it."""

    number: int
    messages: bytes = b""
    busy: bool = False
    used: float = 0.0
    tokens: int = 0
    ended: Refused | None = None


class Sessions:
    """By owner and the number that the client gave."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._found: dict[tuple[str, int], Conversation] = {}
        self._numbers = itertools.count()

    def unnamed(self) -> int:
        """A number for a client that gave none, such as no client can give."""
        return -2 - next(self._numbers)

    def enter(self, owner: str, id: int) -> Conversation:
        """The session, which nobody else can enter before it is left. Raises Refused."""
        self._forget_old()
        session = self._found.get((owner, id))
        if session is None:
            if len(self._found) >= MOST_SESSIONS and not self._forget_oldest(owner):
                raise Refused(
                    429,
                    "too many sessions are in use: try again",
                    code="too_many_sessions",
                    headers={"retry-after": "1"},
                )
            session = self._found[(owner, id)] = Conversation(next(self._numbers))
        if session.busy:
            message = (
                f"session_id: a turn of session {id} is running; expected one turn at a time, or"
                " cancel: true"
            )
            raise Refused(409, message, param="session_id", code="session_busy")
        session.busy, session.used = True, time.monotonic()
        return session

    def leave(self, owner: str, id: int, session: Conversation, *, keep: bool) -> None:
        """A session without a turn is not kept either."""
        session.busy, session.used = False, time.monotonic()
        if self._found.get((owner, id)) is session and not (keep and session.messages):
            self.end(owner, id)

    def end(self, owner: str, id: int, why: Refused | None = None) -> None:
        """Ends a session, and the turn that runs in it, which hears why: by default, that its
        client wanted it. Nothing happens where there is none."""
        session = self._found.pop((owner, id), None)
        if session is not None:
            session.ended = why or _cancelled(id)
            self._service.llm.end_session(session.number)

    def clear(self) -> int:
        """Ends all; how many there were."""
        count = len(self._found)
        for place in list(self._found):
            self.end(*place, aborted())
        return count

    def _forget_old(self) -> None:
        limit = time.monotonic() - self._service.config.session_idle_s
        for place in [
            place
            for place, session in self._found.items()
            if not session.busy and session.used < limit
        ]:
            self.end(*place)

    def _forget_oldest(self, owner: str) -> bool:
        """One of the owner's own, if it has any."""
        idle = [
            (place[0] != owner, session.used, place)
            for place, session in self._found.items()
            if not session.busy
        ]
        if idle:
            self.end(*min(idle)[2])
        return bool(idle)


class TurnShape(Shape):
    """Each event has the characters that are new, and counts them all."""

    def __init__(self, prompt: int, history: int) -> None:
        self._counts: Object = {"input_tokens": prompt, "history_tokens": history}
        self._tokens = 0

    def start(self) -> Iterable[Object]:
        return ()

    def more(self, text: int, tokens: list[Token]) -> Iterable[Object]:
        self._tokens += sum(token.token is not None for token in tokens)
        ended = tokens[-1].finish
        yield self._object("".join(token.text for token in tokens), self._tokens, ended)

    def end(self, usage: Usage) -> Iterable[Object]:
        return ()

    def whole(self, outputs: list[Output], usage: Usage) -> Object:
        completion = outputs[0].completions[0]
        return self._object(completion.text, len(completion.token_ids), completion.finish)

    def _object(self, text: str, tokens: int, finish: Finish | None) -> Object:
        return {
            "text": text,
            "tokens": tokens,
            **self._counts,
            "finish_reason": None if finish is None else str(finish),
        }


def turn_job(service: Service, body: InteractiveRequest, session: Conversation) -> Job:
    """Takes a while: tokenises. The session has been entered. Raises Refused, RequestError."""
    service.check_model(body.model)
    new = for_templates([message.model_dump(exclude_none=True) for message in body.prompt])
    kept, most = _more(session.messages, new), service.context * MOST_PER_TOKEN + MOST_BESIDE
    if len(kept) > most:
        message = (
            f"prompt: {len(kept)} bytes in all that session {body.session_id} would keep; expected"
            f" at most {most}"
        )
        raise Refused(400, message, param="prompt", code="session_too_long")
    tokens = service.prompt_of(json.loads(kept))
    params = SamplingParams(
        max_tokens=body.request_output_len,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(0, body.top_k),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        ignore_eos=body.ignore_eos,
        stop=tuple(body.stop or ()),
        seed=body.seed,
        skip_special_tokens=body.skip_special_tokens,
    )
    history = session.tokens

    def submit(engine: Engine) -> Request:
        if session.ended:
            raise session.ended
        held = engine.sessions[session.number].tokens if session.number in engine.sessions else []
        common = next(
            (i for i, (a, b) in enumerate(zip(held, tokens, strict=False)) if a != b),
            min(len(held), len(tokens)),
        )
        common = min(common, len(tokens) - 1)
        if session.number in engine.sessions:
            engine.rewind(session.number, common)
        return engine.submit(tokens[common:], params, session=session.number)

    def leave(output: Output) -> None:
        """What was said counts, even where the client went away in the middle; a turn that came to
        nothing does not."""
        completion = output.completions[0]
        if completion.text or completion.finish in (Finish.stop, Finish.length):
            session.messages = _more(kept, [{"role": "assistant", "content": completion.text}])
            session.tokens = len(tokens) + len(completion.token_ids)

    return Job(
        [tokens],
        params,
        TurnShape(len(tokens) - history, history),
        body.stream,
        submit=submit,
        leave=leave,
        ended=lambda: session.ended,
    )


def _cancelled(id: int) -> Refused:
    message = f"session_id: the client ended session {id} while this turn ran"
    return Refused(409, message, param="session_id", code="cancelled")


def _more(kept: bytes, messages: list[Object]) -> bytes:
    """JSON of both."""
    new = ",".join(_json(message) for message in messages).encode()
    return b"%b,%b]" % (kept[:-1], new) if kept else b"[%b]" % new


def _json(message: Object) -> str:
    """As short as it can be; with escapes where it holds what is no text, half a surrogate pair."""
    text = json.dumps(message, ensure_ascii=False, separators=(",", ":"))
    return json.dumps(message) if SURROGATE.search(text) else text
