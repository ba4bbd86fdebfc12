"""Dialogues in which what was said is text: a control token that somebody spells out (`</s>`,
`<|im_end|>`) does not become that token.

A template writes its own control tokens and what was said as one text, and a tokenizer finds them
in it by their spelling. So a letter that no text has goes into every such spelling in what was
said, before the template sees it. The control tokens that the tokenizer still finds are the
template's own. They are written in other characters that no text has, the marks are taken out, and
the same tokenizer, whose control tokens are called so, reads the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from tokenizers import Tokenizer

from quantflow.errors import ModelError, Problem, RequestError

# Noncharacters, which Unicode keeps for the inside of programs.
OPEN, CLOSE, MARK = "\ufdd0", "\ufdd1", "\ufdd2"
SPOKEN = ("content", "reasoning_content", "reasoning", "thinking")
PIECE = 2**14  # characters
_RESERVED = re.compile(f"[{OPEN}{CLOSE}{MARK}]")


class Literal:
    """Control tokens are the special ones, and of the other added ones those in brackets that a
    template writes (<think>, say). templates: their sources. Raises ModelError for a tokenizer with
    which it does not work."""

    def __init__(self, tokenizer: Tokenizer, templates: Iterable[str]) -> None:
        templates = [*templates]
        written = "\0".join(templates)
        added = tokenizer.get_added_tokens_decoder()
        control = {
            i: t
            for i, t in added.items()
            if t.content and (t.special or (t.content[0] in "<[" and t.content in written))
        }
        self._control = {i: (token, f"{OPEN}{i}{CLOSE}") for i, token in control.items()}
        self._all_spellings = _spellings(_bare(token.content) for token in control.values())
        self._model_spellings = _spellings(
            _bare(token.content) for token in control.values() if token.special
        )
        self._tokenizer = tokenizer
        self._renamed = _renamed(
            tokenizer, {token.content: private for token, private in self._control.values()}
        )
        self._check_spellings(
            [*(token.content for token in control.values() if token.normalized), *templates]
        )

    def marked(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages as the template may see them. Tokens that are not special are left as they are
        in what the model said, where it wrote them itself and templates look for them. Raises
        RequestError for a letter that is needed here."""
        result = []
        for message in messages:
            _check(*message)
            spellings = (
                self._model_spellings if message.get("role") == "assistant" else self._all_spellings
            )
            result.append(
                {
                    key: (
                        value
                        if key == "role"
                        else _marked(value, spellings if key in SPOKEN else self._all_spellings)
                    )
                    for key, value in message.items()
                }
            )
        return result

    def marked_value(self, value: Any) -> Any:
        """The same of anything else that a template is given."""
        return _marked(value, self._all_spellings)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """The tokens of what a template made of them. special: with those that open every text."""
        return list(
            self._renamed.encode_batch([self._spelled(text)], add_special_tokens=special)[0].ids
        )

    def _spelled(self, text: str) -> str:
        parts, at = [], 0
        for token, begin, end in self._controls(text):
            added, private = self._control[token]
            # What a token takes of the space beside it is in its place. Any other spelling is
            # somebody's own, which the normaliser makes that token of (`＜/s＞`), or a letter that
            # a token for the unknown stands for. One of one letter has its mark behind it.
            if _bare(text[begin:end]) == _bare(added.content) and text[end : end + 1] != MARK:
                parts += [text[at:begin], private]
                at = end
        return "".join([*parts, text[at:]]).replace(MARK, "")

    def _controls(self, text: str) -> Iterator[tuple[int, int, int]]:
        """The control tokens that the tokenizer finds in a text, and where each begins and ends."""
        encoding = self._tokenizer.encode_batch([text], add_special_tokens=False)[0]
        return (
            (token, *place)
            for token, place in zip(encoding.ids, encoding.offsets, strict=True)
            if token in self._control
        )

    def _check_spellings(self, samples: Iterable[str]) -> None:
        """Raises ModelError where the normaliser makes a control token of another spelling in a
        text that nobody but the model's makers wrote: it would be taken for a client's."""
        normalizer = self._tokenizer.normalizer
        for text in samples if normalizer else ():
            for token, begin, end in self._controls(text):
                spelling, expected = _bare(text[begin:end]), _bare(self._control[token][0].content)
                if spelling != expected and normalizer.normalize_str(
                    spelling
                ) == normalizer.normalize_str(expected):
                    raise _cannot(f"its normaliser makes {expected!r} of {spelling[:40]!r}")


def _bare(spelling: str) -> str:
    return spelling.strip() or spelling


@dataclass(frozen=True)
class _Spellings:
    """Of control tokens. longest: characters of one."""

    pattern: re.Pattern[str]
    longest: int

    def mark(self, text: str) -> str:
        """With a mark behind the first letter of each, also where one begins within another. Piece
        by piece: a search holds the interpreter lock for as long as it runs."""
        parts, at = [], 0
        for begin in range(0, len(text), PIECE):
            # up to where the last that begins in it may end
            piece = text[begin : begin + PIECE + self.longest - 1]
            for match in self.pattern.finditer(piece):
                if match.start() < PIECE:
                    end = begin + match.start() + 1
                    parts += [text[at:end], MARK]
                    at = end
        return "".join([*parts, text[at:]])


def _spellings(names: Iterable[str]) -> _Spellings:
    unique = [*dict.fromkeys(names)]
    return _Spellings(
        re.compile(f"(?={_beginning(unique)})" if unique else r"(?!)"),
        max(map(len, unique), default=1),
    )


def _beginning(names: Sequence[str]) -> str:
    """A pattern for a text that begins with any of them: letter by letter, since hundreds of
    alternatives would each be tried."""
    if "" in names:
        return ""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name[0], []).append(name)
    parts = []
    for group in groups.values():
        shared = commonprefix(group)  # noqa: RUF071 - characters are what is compared
        parts.append(re.escape(shared) + _beginning([name[len(shared) :] for name in group]))
    return f"(?:{'|'.join(parts)})"


def _marked(value: Any, spellings: _Spellings) -> Any:
    if isinstance(value, str):
        _check(value)
        return spellings.mark(value)
    if isinstance(value, Mapping):
        return {_marked(key, spellings): _marked(part, spellings) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_marked(part, spellings) for part in value]
    return value


def _check(*templates: str) -> None:
    if any(map(_RESERVED.search, templates)):
        raise RequestError(
            Problem(
                "messages",
                "a letter from U+FDD0 to U+FDD2",
                "text without those, which stand for no letter",
            )
        )


def _renamed(tokenizer: Tokenizer, names: Mapping[str, str]) -> Tokenizer:
    """The same, but for the names of those tokens. Raises ModelError where the library does not
    make that of it."""
    data = json.loads(tokenizer.to_str())
    for token in data["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = data["model"]
    if isinstance(vocab := model.get("vocab"), dict):
        model["vocab"] = {names.get(name, name): i for name, i in vocab.items()}
    elif vocab:  # a unigram model's, with scores
        model["vocab"] = [[names.get(name, name), score] for name, score in vocab]
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    try:
        renamed = Tokenizer.from_str(json.dumps(data))
        same = all(
            renamed.encode(private, add_special_tokens=False).ids
            == tokenizer.encode(name, add_special_tokens=False).ids
            for name, private in names.items()
        )
    except Exception as error:
        raise _cannot(str(error)) from error
    if not same:
        raise _cannot("its normaliser changes the names of its tokens")
    return renamed


def _cannot(why: str) -> ModelError:
    problem = f"its control tokens cannot be told from their spelling in a text ({why})"[:300]
    return ModelError(
        Problem(
            "tokenizer", problem, "a tokenizer for which that works", "Leave --literal-content out"
        )
    )
