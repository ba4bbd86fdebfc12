"""The tokenizer of a model directory, without its remote code, and the tokenizer files of an
artifact.

Four kinds of vocabulary are read, the first that is there: tokenizer.json as it is; SentencePiece's
tokenizer.model (Llama 2, Vicuna, InternLM, Mistral); qwen.tiktoken (the first Qwen); vocab.json
with merges.txt (GPT-2, OPT). The last three become what tokenizer.json would have held, so that an
artifact always has one, and every loader splits text as the calibration did. In the place of a
directory may stand a .gguf file, whose metadata holds one of them.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from quantflow.checkpoints.directory import read_file, read_json
from quantflow.checkpoints.gguf.file import read_metadata
from quantflow.errors import ModelError, Problem, panicked
from quantflow.paths import naming, write_text
from quantflow.placeholder import placeholder_at
from quantflow.tokenizers.dialogue import OF_FAMILY, ChatTemplate, Dialogue
from quantflow.tokenizers.sentencepiece_model import (
    BPE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
    read_sentencepiece,
)

Json = dict[str, Any]
_Token = TypeVar("_Token", str, bytes)

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# every transformers has it, and it takes tokenizer.json as it is
FAST_CLASS = "PreTrainedTokenizerFast"
# transformers' folder for those that are not the default one
TEMPLATES = "additional_chat_templates"
_MOST_IDS = 2**24  # far beyond any vocabulary
SPLITS = "a tokenizer that can split any text"
SPACE = "\u2581"  # ▁, SentencePiece's letter for a space
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{i}|>" for i in range(205)),
)

_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "qwen.tiktoken", "chat_template.jinja",
    "chat_template.json", "generation_config.json",
)  # fmt: skip

# Classes of transformers whose name may stay in tokenizer_config.json beside a tokenizer.json that
# was there. Any other, remote code or TokenizersBackend (which transformers 4 does not have),
# becomes FAST_CLASS.
KEPT_CLASSES = frozenset(
    f"{family}Tokenizer{fast}"
    for family in ("Llama", "CodeLlama", "GPT2", "GPTNeoX", "Qwen2", "Gemma", "Cohere")
    for fast in ("", "Fast")
) | {FAST_CLASS}
# Remote code, and keys that name files: transformers opens fast_tokenizer_files, the others are
# paths of who saved it.
_DROPPED_KEYS = (
    "auto_map", "fast_tokenizer_files", "vocab_file", "merges_file", "tokenizer_file",
    "special_tokens_map_file", "added_tokens_file", "tokenizer_config_file", "name_or_path",
    "init_inputs",
)  # fmt: skip


def special_tokens(path: Path) -> dict[str, str]:
    """The tokens of the roles (`bos_token`, `eos_token`, …) that the tokenizer's files or
    config.json name. Raises ModelError."""
    return _all_roles(_load(path), _optional_json(path / "config.json"))


def chat_template(path: Path) -> ChatTemplate | None:
    """The model's own dialogue format: in files of their own, in tokenizer_config.json, or its
    family's. None for a base model.

    As in transformers, files take the place of what tokenizer_config.json says; where no file is
    the default one, they add to it. Raises ModelError.
    """
    files = _template_files(path)
    if "default" not in files:
        files = {**_named_templates(path / "tokenizer_config.json"), **files}
    family = None if files else _family_dialogue(path)
    if family:
        files = {"default": family.template}
    return ChatTemplate(files) if files else None


def template_place(path: Path) -> str:
    """Where the default one of `chat_template` stands, for a message."""
    if path.is_file():
        return f"{path} tokenizer.chat_template"
    for file in (path / "chat_template.jinja", path / TEMPLATES / "default.jinja"):
        if file.is_file():
            return str(file)
    for file in (path / "chat_template.json", path / "tokenizer_config.json"):
        if "default" in _named_templates(file):
            return f"{file} chat_template"
    return str(path)  # its family's


def turn_end(path: Path) -> str:
    """The token that ends the model's turn where its family's dialogue format says so; "": none but
    the text's own."""
    family = _family_dialogue(path)
    return family.end if family else ""


def _family_dialogue(path: Path) -> Dialogue | None:
    # how the first Qwen marks a base model
    raw_prompts = _optional_json(path / "generation_config.json").get("chat_format") == "raw"
    return (
        None
        if raw_prompts
        else OF_FAMILY.get(str(_optional_json(path / "config.json").get("model_type")))
    )


def tokenizer_files(path: Path) -> dict[str, Path]:
    """The files that the tokenizer of a model directory and its chat templates are read from, by
    their names in it."""
    files = [*(path / name for name in _FILES), *sorted((path / TEMPLATES).glob("*.jinja"))]
    return {file.relative_to(path).as_posix(): file for file in files if file.is_file()}


def has_tokenizer(path: Path) -> bool:
    """Whether a model directory, or a GGUF file, has a tokenizer of a kind that `load_tokenizer`
    knows."""
    return path.is_file() or any(
        (path / name).is_file()
        for name in ("tokenizer.json", "tokenizer.model", "qwen.tiktoken", "vocab.json")
    )


def tokenizer_placeholders(path: Path) -> list[Problem]:
    """What lies in the place of the tokenizer's files of a model directory, without reading one of
    them whole."""
    return [problem for file in tokenizer_files(path).values() if (problem := placeholder_at(file))]


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model directory: ids with special tokens, truncation and padding off.

    A tokenizer.json is taken as it is: its own post-processor adds BOS, or nothing does
    (add_bos_token in tokenizer_config.json then has no say, as in transformers 5). Raises
    ModelError where no file is there, or one is damaged or another model's.
    """
    return _load(path).tokenizer


def export_tokenizer(source: Path, target: Path) -> list[str]:
    """The names of the files written to `target`, sorted: all a loader without remote code needs,
    and nothing else.

    tokenizer.json is copied, or made where the source has another kind of vocabulary; the
    configurations lose what names remote code or files. The same source gives the same bytes.
    Raises ModelError; an OSError of the target is the caller's.
    """
    loaded = _load(source)
    model_config = _optional_json(source / "config.json")
    tokenizer_config = _optional_json(source / "tokenizer_config.json")
    generation_config = _optional_json(source / "generation_config.json")
    special_tokens_map = _optional_json(source / "special_tokens_map.json")
    added_tokens = _optional_json(source / "added_tokens.json")
    templates = _template_files(source)

    for role, token in _all_roles(loaded, model_config).items():
        # A role that is null is null on purpose: Qwen2 has no BOS, whatever its config.json says.
        if role not in tokenizer_config or tokenizer_config[role] is not None:
            tokenizer_config.setdefault(role, token)
            special_tokens_map.setdefault(role, token)
    auto_map = tokenizer_config.get("auto_map")
    remote = isinstance(auto_map, list) or (
        isinstance(auto_map, dict) and "AutoTokenizer" in auto_map
    )
    if loaded.made or remote or str(tokenizer_config.get("tokenizer_class")) not in KEPT_CLASSES:
        tokenizer_config["tokenizer_class"] = FAST_CLASS
    for key in _DROPPED_KEYS:
        tokenizer_config.pop(key, None)

    if set(templates) - {"default"}:  # a list, since older loaders do not know the folder
        named = (
            {**_named_templates(source / "tokenizer_config.json"), **templates}
            if "default" not in templates
            else templates
        )
        tokenizer_config["chat_template"] = [
            {"name": name, "template": text} for name, text in sorted(named.items())
        ]
    chat = _family_dialogue(source)
    if chat and not templates and not tokenizer_config.get("chat_template"):
        tokenizer_config["chat_template"] = chat.template
        generation_config = _ending_turns(generation_config, chat.end, loaded, special_tokens_map)

    target.mkdir(parents=True, exist_ok=True)
    written = []
    if loaded.made:
        write_text(target / "tokenizer.json", loaded.tokenizer.to_str(pretty=True))
        written.append("tokenizer.json")
    for name in ("tokenizer.json", "tokenizer.model"):
        if (source / name).is_file():
            with naming(target / name):
                (target / name).write_bytes(read_file(source / name))
            written.append(name)
    if set(templates) == {"default"}:
        with naming(target / "chat_template.jinja"):
            (target / "chat_template.jinja").write_bytes(templates["default"].encode())
        written.append("chat_template.jinja")
    for name, content in {
        "tokenizer_config.json": tokenizer_config,
        "special_tokens_map.json": special_tokens_map,
        "generation_config.json": generation_config,
        "added_tokens.json": added_tokens,
    }.items():
        if content:
            write_text(target / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
            written.append(name)
    return sorted(written)


@dataclass(frozen=True)
class Loaded:
    """A tokenizer as it was read."""

    tokenizer: Tokenizer
    # bos_token -> "<s>", as far as the vocabulary's own file and the JSON files beside it say
    roles: dict[str, str]
    made: bool  # not read from a tokenizer.json


def _load(path: Path) -> Loaded:
    for name, reader in _READERS.items():
        if (path / name).is_file():
            loaded = reader(path)
            break
    else:
        if path.is_file():
            # which is made of parts of this file
            from quantflow.tokenizers.gguf import tokenizer_from_metadata

            return tokenizer_from_metadata(read_metadata(path), path)
        expected = ", ".join(_READERS) + " with merges.txt"
        if any((path / name).is_file() for name in ("merges.txt", "tekken.json")):
            hint = (
                "merges.txt goes with vocab.json, and tekken.json with a tokenizer.json: download"
                " them too"
            )
        else:
            hint = "Is the download complete?"
        raise ModelError(Problem(str(path), "no tokenizer", f"one of {expected}", hint))
    # A limit stored in tokenizer.json would cut documents without a word.
    loaded.tokenizer.no_truncation()
    loaded.tokenizer.no_padding()
    _check_size(path, loaded.tokenizer)
    return loaded


def _check_size(path: Path, tokenizer: Tokenizer) -> None:
    vocab = tokenizer.get_vocab()
    if (most := max(vocab.values(), default=0)) >= _MOST_IDS:
        # Between two ids the library counts every one that is missing: gigabytes, for one that is
        # near 2^32.
        raise ModelError(
            Problem(
                f"{path} tokenizer",
                f"token ids up to {most}",
                f"less than {_MOST_IDS}",
                "Is the file damaged?",
            )
        )
    rows = _optional_json(path / "config.json").get("vocab_size")
    if not isinstance(rows, int) or isinstance(rows, bool):
        return
    # Added tokens may lie beyond the embedding: people add a padding token that the model never
    # sees.
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    largest = max((i for token, i in vocab.items() if token not in added), default=-1)
    if largest >= rows:
        found, expected = (
            f"token ids up to {largest}",
            f"less than vocab_size {rows} of config.json",
        )
        raise ModelError(Problem(f"{path} tokenizer", found, expected, "Is it another model's?"))


# --- tokenizer.json


def _from_json(path: Path) -> Loaded:
    file = path / "tokenizer.json"
    text = _text(file)
    tokenizer = guarded(
        file, "a tokenizer that the tokenizers library can read", lambda: Tokenizer.from_str(text)
    )
    if (
        isinstance(tokenizer.model, models.BPE)
        and tokenizer.model.unk_token is None
        and _splits_bytes(tokenizer)
    ):
        check_bytes(file, tokenizer.get_vocab())
    declared = _declared(path)
    roles = dict(declared.roles)
    unknown = getattr(tokenizer.model, "unk_token", None)
    if isinstance(unknown, str):
        roles.setdefault("unk_token", unknown)
    return Loaded(tokenizer, roles, made=False)


def _splits_bytes(tokenizer: Tokenizer) -> bool:
    """Whether a text becomes bytes in GPT-2's letters before it is looked up."""
    steps = [
        json.loads(step.__getstate__())
        for step in (tokenizer.normalizer, tokenizer.pre_tokenizer)
        if step is not None
    ]
    return any(
        part["type"] == "ByteLevel"
        for step in steps
        for part in step.get("pretokenizers", step.get("normalizers", [step]))
    )


# --- tokenizer.model: SentencePiece


def _from_sentencepiece(path: Path) -> Loaded:
    file = path / "tokenizer.model"
    data = _data(file)
    try:
        model = read_sentencepiece(data)
    except ValueError as error:  # UnicodeDecodeError is one
        hint = "Is the download complete?"
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
            hint = "It is a tiktoken file, as Llama 3 has: such a model needs its tokenizer.json"
        raise ModelError(
            Problem(str(file), f"not a SentencePiece model ({error})", hint=hint)
        ) from error
    return sentencepiece_tokenizer(path, file, model, _declared(path))


def sentencepiece_tokenizer(
    path: Path, file: Path, model: SentencePieceModel, declared: Declared
) -> Loaded:
    """The tokenizer of a SentencePiece model that stood in `file`, with what else was declared in
    `path`. Raises ModelError."""
    names = [piece.text for piece in model.pieces]
    kinds = [piece.kind for piece in model.pieces]
    for i in declared.placed:
        # A placeholder such as [UNUSED_TOKEN_145] that the configuration gives another name.
        if i < len(names) and names[i] != declared.placed[i].content:
            names[i] = declared.placed[i].content
    vocab = _vocabulary(path, names, declared)

    added = {
        i: AddedToken(names[i], special=True, normalized=False)
        for i, kind in enumerate(kinds)
        if kind in (UNKNOWN, CONTROL)
    }
    # SentencePiece finds these in the normalised text, and lets nothing cross them.
    added |= {
        i: AddedToken(names[i], special=False, normalized=True)
        for i, kind in enumerate(kinds)
        if kind == USER_DEFINED
    }
    added |= {
        vocab[name]: AddedToken(name, special=True, normalized=False)
        for name in declared.specials
        if name in vocab
    }
    added |= declared.placed
    unknown = kinds.index(UNKNOWN)

    if model.kind == BPE:
        scores = {
            piece.text: piece.score
            for i, piece in enumerate(model.pieces)
            if kinds[i] == NORMAL and i not in added
        }
        tokenizer = guarded(
            file,
            "a consistent vocabulary",
            lambda: Tokenizer(
                models.BPE(
                    vocab=vocab,
                    merges=_merges({name: -score for name, score in scores.items()}),
                    unk_token=names[unknown],
                    fuse_unk=True,
                    byte_fallback=model.byte_fallback,
                )
            ),
        )
    else:
        entries = [(name, piece.score) for name, piece in zip(names, model.pieces, strict=True)]
        extra = sorted((i, name) for name, i in vocab.items() if i >= len(names))
        if [i for i, _ in extra] != list(range(len(names), len(vocab))):
            found, expected = (
                f"ids {[i for i, _ in extra]}",
                f"ids that go on from {len(names)} without a gap",
            )
            raise ModelError(Problem(f"{path} added tokens", found, expected))
        entries += [(name, 0.0) for _, name in extra]
        tokenizer = guarded(
            file,
            "a consistent vocabulary",
            lambda: Tokenizer(
                models.Unigram(entries, unk_id=unknown, byte_fallback=model.byte_fallback)
            ),
        )

        if model.byte_fallback:
            # Or <0x41> as somebody wrote it would be found in the vocabulary, and become an A.
            tokenizer.pre_tokenizer = pre_tokenizers.Split(
                Regex("<(?=0x[0-9A-F]{2}>)"), behavior="merged_with_previous"
            )
    symbols = [token.content for token in added.values() if token.normalized]
    tokenizer.normalizer = guarded(
        file, "a character map that can be read", lambda: _space_normalizer(model, symbols)
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.decoder = decoders.Sequence(steps)

    roles = {"unk_token": names[unknown]}
    for role, i in (
        ("bos_token", model.bos_id),
        ("eos_token", model.eos_id),
        ("pad_token", model.pad_id),
    ):
        if 0 <= i < len(names) and kinds[i] == CONTROL:
            roles[role] = names[i]
    roles = {**roles, **declared.roles}
    _add_tokens(tokenizer, added, declared, roles)
    add_template(
        tokenizer,
        roles,
        declared.add_bos if declared.add_bos is not None else True,
        bool(declared.add_eos),
    )
    return Loaded(tokenizer, roles, made=True)


def _space_normalizer(model: SentencePieceModel, symbols: list[str]) -> Any:
    """SentencePiece's normaliser. symbols: added tokens that are looked for in normalised text."""
    steps: list[Any] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.collapse_spaces:
        # Spaces alone: SentencePiece leaves tabs and newlines, where the character map has not made
        # them spaces.
        steps += [
            normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if model.dummy_prefix and symbols:
        # The library normalises the symbols too before it looks for them, and ▁<eoh> would never be
        # found. So a text that is a symbol and nothing else gets no ▁, which SentencePiece would
        # give it: the one difference.
        names = "|".join(re.escape(symbol) for symbol in sorted(symbols))
        steps.append(normalizers.Replace(Regex(rf"\A(?!(?:{names})\z)"), SPACE))
    elif model.dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _merges(order: Mapping[_Token, float]) -> list[tuple[_Token, _Token]]:
    """Every pair of tokens that makes a token, best first. order: the smaller, the earlier a token
    is merged.

    SentencePiece and tiktoken join the adjacent pair whose *result* is best, whatever its halves; a
    list of merges says the same only with each way to split a token in it.
    """
    found = []
    # or a token of a million letters would be cut a million times
    lengths = sorted({len(token) for token in order})
    for token, rank in order.items():
        for cut in lengths:
            if cut >= len(token):
                break
            left, right = token[:cut], token[cut:]
            if left in order and right in order:
                found.append((rank, -cut, left, right))
    found.sort()
    return [(left, right) for _, _, left, right in found]


# --- qwen.tiktoken


def _from_tiktoken(path: Path) -> Loaded:
    file = path / "qwen.tiktoken"
    ranks = _read_ranks(file)
    letters = byte_letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    ordered = sorted(ranks, key=ranks.__getitem__)
    names = [spelled(token) for token in ordered] + list(QWEN_SPECIALS)
    specials = {
        len(ordered) + i: AddedToken(name, special=True, normalized=False)
        for i, name in enumerate(QWEN_SPECIALS)
    }
    # The special tokens' ids follow the last rank: after a cut they would all be others'.
    ends = _optional_json(path / "generation_config.json").get("eos_token_id")
    wrong = [
        i
        for i in (ends if isinstance(ends, list) else [ends])
        if isinstance(i, int) and i not in specials
    ]
    if wrong:
        raise ModelError(
            Problem(
                str(file),
                f"{len(ordered)} tokens, so that id {wrong[0]} is no special token",
                "the vocabulary whose end token generation_config.json gives",
                "Is the download complete?",
            )
        )
    declared = _declared(path)
    vocab = _vocabulary(path, names, declared)
    merges = [(spelled(left), spelled(right)) for left, right in _merges(ranks)]
    tokenizer = guarded(
        # ignore_merges: tiktoken, too, looks a whole word up before it merges.
        file,
        "a consistent vocabulary",
        lambda: Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True)),
    )
    set_qwen_splitting(tokenizer)
    raw_prompts = _optional_json(path / "generation_config.json").get("chat_format") == "raw"
    roles = {
        "eos_token": "<|endoftext|>" if raw_prompts else "<|im_end|>",
        "pad_token": "<|endoftext|>",
        **declared.roles,
    }
    _add_tokens(tokenizer, {**specials, **declared.placed}, declared, roles)
    if declared.add_bos or declared.add_eos:
        add_template(tokenizer, roles, bool(declared.add_bos), bool(declared.add_eos))
    return Loaded(tokenizer, roles, made=True)


def _read_ranks(file: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for i, line in enumerate(_data(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            value = base64.b64decode(token, validate=True)
            number = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ModelError(
                Problem(
                    f"{file} line {i}",
                    f"not a token ({error})",
                    "a token in base64 and its rank",
                    "Is the download complete?",
                )
            ) from error
        if value in ranks:
            raise ModelError(Problem(f"{file} line {i}", f"token {value!r} stands there twice"))
        ranks[value] = number
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if sorted(ranks.values()) != list(range(len(ranks))) or missing:
        found = f"{len(ranks)} tokens, {len(missing)} of the 256 single bytes missing"
        raise ModelError(
            Problem(
                str(file),
                found,
                "every rank from 0 once, and every byte",
                "Is the download complete?",
            )
        )
    return ranks


def set_qwen_splitting(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)


def byte_letters() -> list[str]:
    """The printable letter that GPT-2's vocabulary has for each of the 256 bytes."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (chr(256 + i) for i in range(256))
    return [chr(byte) if byte in visible else next(others) for byte in range(256)]


def check_bytes(where: Path | str, vocab: Collection[str]) -> None:
    """Raises ModelError for a byte-level vocabulary in which a letter, digit or sign of ASCII has
    no token.

    Bytes that no text of the training had may have none (of SmolLM2's, 21: control characters, and
    bytes that are in no letter): the library leaves them out of a text, as it does in transformers
    and llama.cpp. No text can do without the others.
    """
    missing = [byte for byte, letter in enumerate(byte_letters()) if letter not in vocab]
    if not any(byte in missing for byte in range(ord("!"), 127)):
        return
    runs = [
        [byte for _, byte in run]
        for _, run in groupby(enumerate(missing), key=lambda item: item[1] - item[0])
    ]
    which = ", ".join(
        f"{run[0]:#04x}" + (f" to {run[-1]:#04x}" if len(run) > 1 else "") for run in runs
    )
    found = f"{len(missing)} of the 256 bytes have no token: {which}"
    expected = "a byte-level vocabulary, with all 94 signs of ASCII (0x21 to 0x7e)"
    raise ModelError(
        Problem(str(where), found, expected, "What has no token would be left out of every text")
    )


# --- vocab.json and merges.txt


def _from_vocab(path: Path) -> Loaded:
    file = path / "vocab.json"
    vocab = read_json(file)
    bad = next(
        (t for t, i in vocab.items() if not isinstance(i, int) or isinstance(i, bool) or i < 0),
        None,
    )
    if bad is not None or len(set(vocab.values())) < len(vocab):
        found = (
            f"token {bad!r} has the id {vocab[bad]!r}"
            if bad is not None
            else "two tokens have one id"
        )
        raise ModelError(Problem(str(file), found, "an id for each token"))
    check_bytes(file, vocab)
    if not (path / "merges.txt").is_file():
        raise ModelError(
            Problem(
                str(path / "merges.txt"),
                "missing",
                "the merges that go with vocab.json",
                "Is the download complete?",
            )
        )
    merges = _read_merges(path / "merges.txt", vocab)

    declared = _declared(path)
    model_type = _optional_json(path / "config.json").get("model_type")
    qwen = str(model_type).startswith(("qwen2", "qwen3")) or str(
        declared.config.get("tokenizer_class")
    ).startswith("Qwen2")
    end = "</s>" if model_type == "opt" else "<|endoftext|>"
    roles = {
        role: end
        for role in ("bos_token", "eos_token", "unk_token")
        if end in vocab and not (qwen and role == "bos_token")
    }
    roles = {**roles, **declared.roles}
    by_id = {i: token for token, i in vocab.items()}
    clash = next(
        (i for i, token in declared.placed.items() if by_id.get(i, token.content) != token.content),
        None,
    )
    if clash is not None:
        where = f"{path} added token {declared.placed[clash].content!r}"
        raise ModelError(Problem(where, f"has id {clash}, which is {by_id[clash]!r} in vocab.json"))
    for i, token in declared.placed.items():
        vocab[token.content] = i
    tokenizer = guarded(
        path / "merges.txt",
        "merges of tokens in vocab.json",
        lambda: Tokenizer(models.BPE(vocab=vocab, merges=merges)),
    )
    if qwen:
        set_qwen_splitting(tokenizer)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=bool(declared.config.get("add_prefix_space", False))
        )
        tokenizer.decoder = decoders.ByteLevel()
    names = [name for name in (*roles.values(), *declared.specials) if name in vocab]
    named = {vocab[name]: AddedToken(name, special=True, normalized=False) for name in names}
    _add_tokens(tokenizer, {**named, **declared.placed}, declared, roles)
    # OPT was trained with </s> in front.
    add_bos = declared.add_bos if declared.add_bos is not None else model_type == "opt"
    if add_bos or declared.add_eos:
        add_template(tokenizer, roles, add_bos, bool(declared.add_eos))
    return Loaded(tokenizer, roles, made=True)


def _read_merges(file: Path, vocab: Json) -> list[tuple[str, str]]:
    merges = []
    for i, line in enumerate(_text(file).split("\n"), start=1):
        line = line.rstrip("\r")
        if not line or line.startswith("#version"):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or any(part not in vocab for part in (*parts, "".join(parts))):
            raise ModelError(
                Problem(
                    f"{file} line {i}",
                    repr(line),
                    "two tokens of vocab.json that make a third",
                    "Is the download complete?",
                )
            )
        merges.append((parts[0], parts[1]))
    # Every longer token but the special ones is the result of a merge; a file cut at a line's end
    # has lost some.
    made = {left + right for left, right in merges}
    orphans = [
        token
        for token in vocab
        if len(token) > 1
        and token not in made
        and not re.fullmatch(r"<.*>|\[.*\]|madeupword\d+", token)
    ]
    if len(orphans) > max(16, len(vocab) // 20):
        found = f"no merge for {len(orphans)} of {len(vocab)} tokens"
        raise ModelError(
            Problem(str(file), found, "the merges of vocab.json", "Is the download complete?")
        )
    return merges


# --- special tokens


@dataclass(frozen=True)
class Declared:
    """What tokenizer_config.json, special_tokens_map.json and added_tokens.json say."""

    config: Json
    roles: dict[str, str] = field(default_factory=dict)
    specials: tuple[str, ...] = ()  # the roles' tokens and the additional ones
    placed: dict[int, AddedToken] = field(default_factory=dict)  # tokens with an id of their own
    add_bos: bool | None = None
    add_eos: bool | None = None


def _declared(path: Path) -> Declared:
    problems: list[Problem] = []
    config = _optional_json(path / "tokenizer_config.json")
    special_map = _optional_json(path / "special_tokens_map.json")
    # As in transformers: the older file counts where the newer way to list added tokens is not
    # used.
    sources = [(special_map, "special_tokens_map.json"), (config, "tokenizer_config.json")]
    if "added_tokens_decoder" not in config:
        sources.reverse()
    roles: dict[str, str] = {}
    specials: list[str] = []
    for content, name in sources:
        for role in ROLES:
            value = content.get(role)
            token = value.get("content") if isinstance(value, dict) else value
            if isinstance(token, str) and token:
                roles[role] = token
            elif token is not None:
                problems.append(Problem(f"{path / name} {role}", repr(value)[:80], "a token"))
        for key in ("additional_special_tokens", "extra_special_tokens"):
            values = content.get(key) or []
            values = list(values.values()) if isinstance(values, dict) else values
            tokens = (
                [v.get("content") if isinstance(v, dict) else v for v in values]
                if isinstance(values, list)
                else [values]
            )
            specials += [token for token in tokens if isinstance(token, str) and token]
            problems += [
                Problem(f"{path / name} {key}", repr(t)[:80], "tokens")
                for t in tokens
                if not isinstance(t, str) or not t
            ]
    specials = list(dict.fromkeys([*roles.values(), *specials]))

    placed: dict[int, AddedToken] = {}
    for token, index in _optional_json(path / "added_tokens.json").items():
        if not isinstance(index, int) or isinstance(index, bool) or index < 0 or not token:
            problems.append(
                Problem(f"{path / 'added_tokens.json'} {token!r}", repr(index)[:80], "an id")
            )
            continue
        special = token in specials
        placed[index] = AddedToken(token, special=special, normalized=not special)
    decoder = config.get("added_tokens_decoder") or {}
    for key, entry in decoder.items() if isinstance(decoder, dict) else [("", decoder)]:
        token = entry.get("content") if isinstance(entry, dict) else None
        if not re.fullmatch(r"\d{1,9}", key) or not isinstance(token, str) or not token:
            problems.append(
                Problem(
                    f"{path / 'tokenizer_config.json'} added_tokens_decoder {key}",
                    repr(entry)[:80],
                    "an id, its token",
                )
            )
            continue
        special = bool(entry.get("special")) or token in specials
        flags = {flag: bool(entry.get(flag, False)) for flag in ("single_word", "lstrip", "rstrip")}
        # A special token is looked for in the text as it is written.
        placed[int(key)] = AddedToken(
            token,
            special=special,
            normalized=not special and bool(entry.get("normalized", True)),
            **flags,
        )
    contents = Counter(token.content for token in placed.values())
    for twice in sorted(content for content, count in contents.items() if count > 1):
        problems.append(Problem(f"{path} added tokens", f"{twice!r} has two ids", "one"))
    if problems:
        raise ModelError(problems)
    add_bos, add_eos = (
        config[key] if isinstance(config.get(key), bool) else None
        for key in ("add_bos_token", "add_eos_token")
    )
    return Declared(config, roles, tuple(specials), dict(sorted(placed.items())), add_bos, add_eos)


def _vocabulary(path: Path, names: list[str], declared: Declared) -> dict[str, int]:
    """Token -> id of a vocabulary and the tokens added to it with an id of their own."""
    entries = [
        *enumerate(names),
        *((i, token.content) for i, token in declared.placed.items() if i >= len(names)),
    ]
    vocab: dict[str, int] = {}
    problems = []
    for i, name in entries:
        if vocab.setdefault(name, i) != i:
            problems.append(
                Problem(
                    f"{path} added token {name!r}",
                    f"has the id {i}, and is in the vocabulary as {vocab[name]}",
                    "one id",
                )
            )
    if problems:
        raise ModelError(problems)
    return vocab


def _add_tokens(
    tokenizer: Tokenizer,
    added: Mapping[int, AddedToken],
    declared: Declared,
    roles: Mapping[str, str],
) -> None:
    """Makes tokens of the vocabulary special; those without an id come behind it, as in
    transformers."""
    tokenizer.add_tokens([token for _, token in sorted(added.items())])
    present = tokenizer.get_vocab()
    new = [
        name for name in dict.fromkeys([*roles.values(), *declared.specials]) if name not in present
    ]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in new])


def add_template(
    tokenizer: Tokenizer, roles: Mapping[str, str], add_bos: bool, add_eos: bool
) -> None:
    bos = roles.get("bos_token") if add_bos else None
    eos = roles.get("eos_token") if add_eos else None
    single = [f"{bos}:0"] * bool(bos) + ["$A:0"] + [f"{eos}:0"] * bool(eos)
    pair = single + [f"{bos}:1"] * bool(bos) + ["$B:1"] + [f"{eos}:1"] * bool(eos)
    if strange := [
        token for token in (bos, eos) if token and (":" in token or token.startswith("$"))
    ]:
        # which say to the library what else goes around a text
        expected = "one without a colon, and without a dollar sign in front"
        raise ModelError(
            Problem("tokenizer", f"{strange[0]!r}"[:80] + " as the token around a text", expected)
        )
    if bos or eos:
        tokens = [
            (token, tokenizer.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token
        ]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=tokens
        )


# --- files of the artifact


def _all_roles(loaded: Loaded, model_config: Json) -> dict[str, str]:
    """The tokens of the roles a loader asks for; what the tokenizer's files leave open comes from
    config.json's ids."""
    roles = {role: loaded.roles[role] for role in ROLES if role in loaded.roles}
    for role in ("bos_token", "eos_token", "pad_token"):
        index = model_config.get(f"{role}_id")
        index = index[0] if isinstance(index, list) and index else index
        if (
            role not in roles
            and isinstance(index, int)
            and not isinstance(index, bool)
            and 0 <= index < 2**31
        ):
            token = loaded.tokenizer.id_to_token(index)
            if token is not None:
                roles[role] = token
    return roles


def _ending_turns(
    generation_config: Json, end: str, loaded: Loaded, special_tokens_map: Json
) -> Json:
    """generation_config.json with the token that ends a turn among those that end the text: the
    remote code's chat() had it."""
    index = loaded.tokenizer.token_to_id(end)
    if index is None:
        return generation_config
    config = dict(generation_config)
    for role in ("bos_token", "eos_token", "pad_token"):
        token = special_tokens_map.get(role) or loaded.roles.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        own = loaded.tokenizer.token_to_id(token) if isinstance(token, str) else None
        if own is not None:
            config.setdefault(f"{role}_id", own)
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends] if ends is not None else []
    config["eos_token_id"] = ends if index in ends else [*ends, index]
    return config


def _template_files(source: Path) -> dict[str, str]:
    """The chat templates that stand in files of their own, or in GGUF's metadata, by name."""
    if source.is_file():
        prefix = "tokenizer.chat_template"
        found = {
            key.removeprefix(prefix): text
            for key, text in read_metadata(source).items()
            if key.startswith(prefix)
        }
        return {
            name[1:] or "default": text
            for name, text in found.items()
            if name[:1] in ("", ".") and isinstance(text, str) and text
        }
    files = {
        file.stem: file for file in sorted((source / TEMPLATES).glob("*.jinja")) if file.is_file()
    }
    if (source / "chat_template.jinja").is_file():
        files["default"] = source / "chat_template.jinja"
    found = {name: _text(file) for name, file in files.items()}
    return (
        found
        if "default" in found
        else {**_named_templates(source / "chat_template.json"), **found}
    )


def _named_templates(file: Path) -> dict[str, str]:
    """What `chat_template` says in a JSON file: one template, or several with their names. Raises
    ModelError for any other shape."""
    said = _optional_json(file).get("chat_template")
    if not said:
        return {}
    if isinstance(said, str):
        return {"default": said}
    entries = (
        [(t.get("name"), t.get("template")) if isinstance(t, dict) else (None, None) for t in said]
        if isinstance(said, list)
        else (list(said.items()) if isinstance(said, dict) else [(None, None)])
    )
    if any(not isinstance(name, str) or not isinstance(text, str) for name, text in entries):
        raise ModelError(
            Problem(
                f"{file} chat_template",
                repr(said)[:80],
                "a template, or a list of objects with name and template",
            )
        )
    return dict(entries)


# --- reading


def _optional_json(file: Path) -> Json:
    return read_json(file) if file.is_file() else {}


def _data(file: Path) -> bytes:
    data = read_file(file)
    if not data:
        raise ModelError(Problem(str(file), "an empty file", hint="Is the download complete?"))
    return data


def _text(file: Path) -> str:
    try:
        return _data(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(Problem(str(file), f"not text ({error})", "UTF-8")) from error


def guarded(
    where: Path | str,
    expected: str,
    build: Callable[[], Any],
    passing: type[Exception] | tuple[()] = (),
) -> Any:
    """What `build` gives; raises ModelError for whatever the tokenizers library says of a damaged
    file. passing: exceptions of `build`'s own."""
    try:
        return build()
    except passing:
        raise
    except BaseException as error:
        # The library raises plain Exceptions, and panics, which are no Exceptions, for data it did
        # not foresee.
        if isinstance(error, Exception) or panicked(error):
            raise ModelError(
                Problem(
                    str(where),
                    str(error).strip().split("\n")[0][:200],
                    expected,
                    "Is the download complete?",
                )
            ) from error
        raise


_READERS: dict[str, Callable[[Path], Loaded]] = {
    "tokenizer.json": _from_json,
    "tokenizer.model": _from_sentencepiece,
    "qwen.tiktoken": _from_tiktoken,
    "vocab.json": _from_vocab,
}
