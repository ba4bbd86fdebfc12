"""What a drawn token makes of a sequence: its text grows, and perhaps it ends.

Nothing here gives back what an ended sequence holds; that is the engine's.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from quantflow.engine.request import Finish, Logprob, Sequence, Token
from quantflow.engine.text import Detokenizer, Text
from quantflow.errors import ModelError


def append(
    sequence: Sequence,
    token: int,
    logprob: Logprob | None,
    text: Text | None,
    end_tokens: Collection[int],
) -> Token:
    """Adds a token to a sequence. Where that ends it, the result says why, and has the rest of its
    text. text: None for a model without a tokenizer. end_tokens: those that end every text."""
    params, first = sequence.request.params, not sequence.generated
    sequence.tokens.append(token)
    free = sequence.generated >= params.min_tokens
    ends_all = token in end_tokens and not params.ignore_eos
    ends = free and (ends_all or token in params.stop_token_ids)

    # what can be shown, and whether a stop string stands in it
    shown, reason = "", ""
    finish: Finish | None = None
    stop: str | int | None = None
    if text and (params.include_stop or not ends):
        if sequence.detokenizer is None:
            sequence.detokenizer = _detokenizer(sequence, text)
        try:
            shown = sequence.detokenizer.add(token, search=free)
            stop = sequence.detokenizer.stop
        except ModelError as error:
            # the tokenizer does not know what its tokens say: this text is over, the others are not
            sequence.detokenizer = None
            finish, reason = Finish.error, str(error)

    # whether the text ends
    if finish is None:
        if ends or stop is not None:
            finish = Finish.stop
        elif sequence.matcher:
            sequence.matcher.add(token)
            reason = sequence.matcher.problem
            if reason or sequence.matcher.ended:
                finish = fault(sequence) if reason else Finish.stop
    if finish is None and sequence.generated >= sequence.request.most_tokens:
        finish = Finish.length

    result = Token(
        sequence.request.id,
        sequence.index,
        token,
        shown,
        logprob,
        prompt_logprobs=tuple(sequence.prompt_logprobs) if first else (),
        cached=sequence.cached,
    )
    if finish is None:
        return result
    if stop is None and ends and not ends_all:
        stop = token
    return replace(result, text=shown + _rest(sequence), finish=finish, reason=reason, stop=stop)


def last_token(sequence: Sequence, finish: Finish, reason: str = "") -> Token:
    """What ends a sequence without another token: the rest of its text."""
    return Token(
        sequence.request.id,
        sequence.index,
        None,
        _rest(sequence),
        finish=finish,
        reason=reason,
        cached=sequence.cached,
    )


def fault(sequence: Sequence) -> Finish:
    """Why a sequence ends for which no token is possible."""
    matcher = sequence.matcher
    return Finish.grammar if matcher and matcher.problem and not matcher.panicked else Finish.error


def _detokenizer(sequence: Sequence, text: Text) -> Detokenizer:
    params = sequence.request.params
    return Detokenizer(
        text,
        sequence.request.prompt,
        params.stop,
        special=not params.skip_special_tokens,
        whole_stops=params.include_stop,
    )


def _rest(sequence: Sequence) -> str:
    """The text that was held back; after this, none is."""
    detokenizer, sequence.detokenizer = sequence.detokenizer, None
    return detokenizer.finish() if detokenizer else ""
