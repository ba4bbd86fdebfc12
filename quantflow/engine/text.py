"""Text in and out of a model: prompts, dialogues, and the characters that each new token adds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from quantflow.checkpoints.directory import read_json
from quantflow.engine.literal import Literal
from quantflow.engine.renderer import Renderer, TemplateRefused
from quantflow.errors import ModelError, Problem, RequestError
from quantflow.tokenizers.byte_level import byte_characters
from quantflow.tokenizers.chat_templates import chat_template, template_place, turn_end
from quantflow.tokenizers.dialogue import DIALOGUES, ChatTemplate
from quantflow.tokenizers.load import load_tokenizer, special_tokens
from quantflow.tokenizers.reading import SPLITS, guarded
from quantflow.tokenizers.sentencepiece import SPACE

Message = Mapping[str, Any]  # role and content

CONTEXT = 8  # tokens before, that the text of the next one may depend on
LONGEST = 8  # tokens that may make one letter; what is no letter by then is shown as it is
# What templates see for today where a model is measured: the tokens of a text must be the same
# tomorrow. Llama 3.1's own template says so where there is no clock.
OFFLINE_DATE = datetime(2024, 7, 26)
BROKEN = "\ufffd"
CONTINUES = "\ue000 "  # a letter that no script has, where a message's text is to be continued
_SIMPLEST = [{"role": role, "content": "Hello"} for role in ("system", "user", "assistant")]
# how byte-level vocabularies write bytes
BYTE_OF = {letter: byte for byte, letter in enumerate(byte_characters())}


class Text:
    """The tokenizer of a model directory, its dialogue format and its end tokens. dialogue: a
    format by name, in place of the model's own. Raises ModelError, and RequestError for a name that
    is not known."""

    def __init__(self, folder: Path, dialogue: str | None = None) -> None:
        if dialogue is not None and dialogue not in DIALOGUES:
            raise RequestError(
                Problem("dialogue", repr(dialogue), "one of " + ", ".join(sorted(DIALOGUES)))
            )
        self.folder, self._renderer = folder, Renderer()
        self.tokenizer: Tokenizer = load_tokenizer(folder)
        self.roles = special_tokens(folder)
        self._added = {
            token: added.special
            for token, added in self.tokenizer.get_added_tokens_decoder().items()
        }
        decoder = self.tokenizer.decoder
        self._byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
        self.template = (
            ChatTemplate({"default": DIALOGUES[dialogue].template})
            if dialogue
            else chat_template(folder)
        )
        turn = DIALOGUES[dialogue].end if dialogue else turn_end(folder)
        self.end_tokens = end_tokens(
            folder, self.tokenizer, [self.roles.get("eos_token", ""), turn]
        )

    @cached_property
    def longest(self) -> int:
        """Letters of the longest token."""
        return max(map(len, self.tokenizer.get_vocab()))

    @cached_property
    def literal(self) -> Literal:
        """Raises ModelError for a tokenizer with which that does not work."""
        return Literal(self.tokenizer, self.templates)

    @property
    def templates(self) -> list[str]:
        return [*self.template.templates.values()] if self.template else []

    def encode(self, text: str, *, special: bool = True, literal: bool = False) -> list[int]:
        """special: with the tokens that open every text (BOS), where the model has them. literal:
        of what `render` wrote so."""

        # encode_batch, for one text too: encode holds the interpreter lock
        def encode() -> list[int]:
            if literal:
                return self.literal.encode(text, special=special)
            return list(self.tokenizer.encode_batch([text], add_special_tokens=special)[0].ids)

        try:
            return list(guarded(self.folder, SPLITS, encode, passing=TypeError))
        except TypeError as error:  # half a surrogate pair
            raise RequestError(
                Problem("prompt", "no valid Unicode text", "text that UTF-8 can hold")
            ) from error

    def decode(self, tokens: Sequence[int]) -> str:
        return self.joined(list(tokens), special=False)

    def joined(self, tokens: list[int], *, special: bool) -> str:
        """The text of tokens. special: with that of special ones. Raises ModelError for a decoder
        that cannot put them together."""
        expected = "a tokenizer whose tokens make a text"
        # decode_batch, for one text too: decode holds the interpreter lock.
        return str(
            guarded(
                self.folder,
                expected,
                lambda: self.tokenizer.decode_batch([tokens], skip_special_tokens=not special)[0],
            )
        )

    def token_bytes(self, token: int) -> bytes:
        """What a token says by itself: a part of a letter, perhaps."""
        name = self.tokenizer.id_to_token(token)
        if name is None:
            return b""
        if token in self._added:
            return str(name).encode()
        if self._byte_level:
            return b"".join(
                bytes([BYTE_OF[letter]]) if letter in BYTE_OF else str(letter).encode()
                for letter in name
            )
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", name):  # SentencePiece's byte
            return bytes.fromhex(name[3:5])
        return str(name).replace(SPACE, " ").encode()

    def token_text(self, token: int) -> str:
        """It as text; a part of a letter as OpenAI writes it, `bytes:\\xe2\\x82`."""
        data = self.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def special_id(self, name: str) -> int | None:
        """The id of a token that text alone does not make; None where it is none."""
        token = self.tokenizer.token_to_id(name)
        return token if token is not None and self._added.get(token) else None

    def on(self, date: datetime) -> Text:
        """The same, of which templates see `date` in place of today."""
        text = copy(self)
        text._renderer = Renderer(date)
        return text

    def warm(self) -> None:
        """Makes ready what takes a moment at first use: the longest token is found, and the process
        that renders dialogues started. A template that refuses an empty dialogue has been started,
        too."""
        _ = self.longest
        if self.template:
            with suppress(TemplateRefused):
                self._renderer.render("", {})

    def check_template(self) -> None:
        """Raises ModelError where the dialogue format does not even write the simplest dialogue:
        nothing is wrong with what it is given then, but with the model's directory."""
        if self.template is None or self.template.default is None:
            return
        refusal: RequestError | None = None
        # some must have an answer, or a system message
        for messages in (_SIMPLEST[1:2], _SIMPLEST[1:], _SIMPLEST):
            try:
                self.render(messages, add_generation_prompt=False)
                return
            except RequestError as error:
                refusal = refusal or error
        problem = (
            "the chat template refuses even a dialogue of one word"
            f" ({refusal and refusal.__cause__})"
        )
        expected = "a template that writes dialogues"
        raise ModelError(
            Problem(
                template_place(self.folder),
                problem,
                expected,
                "Download the file again, or put another template there",
            )
        )

    def dialogue(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a dialogue in the model's own format, up to where its answer begins. Raises
        RequestError."""
        return self.encode(self.render(messages), special=False)

    def render(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continued: bool = False,
        literal: bool = False,
    ) -> str:
        """variables: further ones of the template (documents, …), of any names but those that it is
        given here. tools: as JSON schemas.
        add_generation_prompt: with what an answer begins with. continued: the text ends where the
        last message's content does, so that an answer goes on from there. literal: for `encode`
        alone, which then makes no control tokens of what was said. Raises RequestError."""
        # Messages of the right shape, and a template for them.
        problems = [
            Problem(f"messages[{i}]", repr(m)[:80], "an object with role and content, both text")
            for i, m in enumerate(messages)
            if not isinstance(m, Mapping)
            or not isinstance(m.get("role"), str)
            or not isinstance(m.get("content", ""), (str, type(None)))
        ]
        if problems or not messages:
            raise RequestError(problems or Problem("messages", "none", "at least one"))
        if self.template is None:
            hint = (
                "Send a prompt, name a dialogue format, or put a chat_template.jinja into the"
                " directory"
            )
            raise RequestError(
                Problem(
                    "messages",
                    "the model has no dialogue format",
                    "a model with a chat template",
                    hint,
                )
            )
        template = self.template.default if tools is None else self.template.tool_use
        if template is None:
            problem = (
                "the model's chat templates are called"
                f" {', '.join(sorted(self.template.templates))}"
            )
            raise RequestError(
                Problem(
                    "messages",
                    problem,
                    "one called default" + (" or tool_use" if tools is not None else ""),
                )
            )
        # What the template sees.
        turns = [{k: v for k, v in message.items() if v is not None} for message in messages]
        if literal:
            turns, tools = self.literal.marked(turns), self.literal.marked_value(tools)
            variables = {
                name: self.literal.marked_value(value) for name, value in (variables or {}).items()
            }
        content = turns[-1].get("content") or ""
        if continued:
            turns[-1]["content"] = content + CONTINUES
        whole = {
            "documents": None,
            **(variables or {}),
            **self.roles,
            "messages": [_with_reasoning(m) for m in turns],
            "tools": tools,
            "add_generation_prompt": add_generation_prompt and not continued,
        }
        # The text.
        try:
            text = self._renderer.render(template, whole)
            return _until(text, content) if continued else text
        except (
            TemplateRefused,
            TypeError,
            ValueError,
            RecursionError,
        ) as error:  # the last three: what JSON cannot hold
            raise RequestError(
                Problem("messages", f"the model's chat template refused them: {error}")
            ) from error


def _until(text: str, content: str) -> str:
    """The text up to where CONTINUES stands, behind `content`. A template that trims contents has
    trimmed the space behind the sign only: what stands before it is for us to trim, as transformers
    does. Raises TemplateRefused."""
    place = text.rfind(CONTINUES.rstrip())
    if place < 0 or content.strip() not in text:
        raise TemplateRefused(
            "the last message cannot be continued: its text is not written as it is"
        )
    return text[:place] if text.startswith(CONTINUES, place) else text[:place].rstrip()


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose reasoning, whatever it was sent as, stands under both names that templates
    read: `thinking` is gpt-oss's. Where a template writes a message down whole, transformers has
    the one before what was sent and the other behind it."""
    for name in ("reasoning_content", "thinking", "reasoning"):
        if name in message:
            shown = {"thinking": message[name]} | message
            shown.setdefault("reasoning_content", message[name])
            return shown
    return message


def end_tokens(folder: Path, tokenizer: Tokenizer, named: Sequence[str]) -> frozenset[int]:
    """The tokens that end a text: eos_token_id of generation_config.json or else, as for
    transformers, of config.json; and those `named` that the tokenizer has."""
    tokens: set[int | None] = {tokenizer.token_to_id(token) for token in named}
    files = [
        folder / name
        for name in ("generation_config.json", "config.json")
        if (folder / name).is_file()
    ]
    value = next(
        (value for file in files if (value := read_json(file).get("eos_token_id")) is not None),
        None,
    )
    if value is not None:
        tokens |= {
            v
            for v in (value if isinstance(value, list) else [value])
            if isinstance(v, int) and not isinstance(v, bool)
        }
    return frozenset(v for v in tokens if v is not None and v >= 0)


class Detokenizer:
    """The text of one sequence as it grows. Letters that may be the beginning of a stop string are
    held back, and so are bytes that may be the beginning of a letter.

    What a token adds is what the text of some tokens before it grows by: it depends on them, since
    SentencePiece drops the space before a first word and a letter may be made of several tokens.
    special: whether special tokens are shown. whole_stops: whether the stop string that ends a text
    is.
    """

    def __init__(
        self,
        text: Text,
        prompt: Sequence[int],
        stops: Sequence[str],
        *,
        special: bool = False,
        whole_stops: bool = False,
    ) -> None:
        self._text, self._stops, self._special, self._whole_stops = (
            text,
            stops,
            special,
            whole_stops,
        )
        # the tokens before, then those whose text is not shown yet
        self._ids = list(prompt[-CONTEXT:])
        self._known = len(self._ids)
        # the prompt ends within a letter
        while self._known and self._decode(self._known).endswith(BROKEN):
            self._known -= 1
        # or its last tokens begin within one
        while self._known and self._decode(self._known).startswith(BROKEN):
            self._ids, self._known = self._ids[1:], self._known - 1
        self._held = ""
        self.stop: str | None = None

    def add(self, token: int, *, search: bool = True) -> str:
        """The characters that can be shown now. search: whether stop strings count yet. `stop` is
        the one that was found."""
        self._ids.append(token)
        self._held += self._grown(whole=len(self._ids) - self._known > LONGEST)
        if not self._stops or not search:
            return self._take(len(self._held))
        matches = [
            (at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0
        ]
        if matches:
            # which is whole first, however the tokens cut the text
            end, at, self.stop = min(matches)
            shown, self._held = self._held[: end if self._whole_stops else at], ""
            return shown
        return self._take(len(self._held) - self._may_begin())

    def finish(self) -> str:
        """The characters that were held back, once no more tokens come."""
        if self.stop is not None:
            return ""
        self._held += self._grown(whole=True)
        return self._take(len(self._held))

    def _decode(self, count: int) -> str:
        return self._text.joined(self._ids[:count], special=self._special)

    def _grown(self, *, whole: bool) -> str:
        """What the text has grown by. whole: even if its last letter is not."""
        before, after = self._decode(self._known), self._decode(len(self._ids))
        if after.endswith(BROKEN) and not whole:
            return ""
        # what was shown last begins with a whole letter
        self._ids, self._known = self._ids[self._known :], len(self._ids) - self._known
        # A stray byte may spoil characters before it, which have been shown: only what comes after
        # them is new.
        return after[len(before) :]

    def _take(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        return shown

    def _may_begin(self) -> int:
        """Letters at the end that are the beginning of a stop string."""
        longest = min(max(len(stop) for stop in self._stops) - 1, len(self._held))
        return next(
            (
                n
                for n in range(longest, 0, -1)
                if any(stop.startswith(self._held[-n:]) for stop in self._stops)
            ),
            0,
        )
