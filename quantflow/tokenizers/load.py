"""The tokenizer of a model directory, without its remote code.

Four kinds of vocabulary are read, the first that is there: tokenizer.json as it is; SentencePiece's
tokenizer.model; qwen.tiktoken; vocab.json with merges.txt. The last three become what
tokenizer.json would have held, so that an artifact always has one, and every loader splits text as
the calibration did. In the place of a directory may stand a .gguf file, whose metadata holds one of
them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, models

from quantflow.checkpoints.gguf.header import read_metadata
from quantflow.errors import ModelError, Problem
from quantflow.placeholder import placeholder_at
from quantflow.tokenizers.byte_level import check_bytes, from_tiktoken, from_vocab
from quantflow.tokenizers.chat_templates import TEMPLATES
from quantflow.tokenizers.declared import ROLES, read_declared
from quantflow.tokenizers.loaded import Loaded
from quantflow.tokenizers.processor import PROCESSOR_FILES
from quantflow.tokenizers.reading import Json, file_text, guarded, optional_json
from quantflow.tokenizers.sentencepiece import from_sentencepiece, is_tiktoken

_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "qwen.tiktoken", "chat_template.jinja",
    "chat_template.json", "generation_config.json",
)  # fmt: skip

_MOST_IDS = 2**24  # far beyond any vocabulary


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model directory: ids with special tokens, truncation and padding off.

    A tokenizer.json is taken as it is: its own post-processor adds BOS, or nothing does
    (add_bos_token in tokenizer_config.json then has no say, as in transformers 5). Raises
    ModelError where no file is there, or one is damaged or another model's.
    """
    return load(path).tokenizer


def has_tokenizer(path: Path) -> bool:
    """Whether a model directory, or a GGUF file, has a tokenizer of a kind that `load_tokenizer`
    knows."""
    return path.is_file() or any(
        (path / name).is_file()
        for name in ("tokenizer.json", "tokenizer.model", "qwen.tiktoken", "vocab.json")
    )


_CODE_READS_IT = (
    "tokenizer_config.json names code of the model's directory, which is never run: such a model"
    " needs a tokenizer.json{}"
)
_ELSEWHERE = {"chatglm": " (for GLM-4-9B: that of glm-4-9b-chat-hf)"}  # by model_type


def tokenizer_problem(path: Path) -> Problem | None:
    """What keeps a model directory's tokenizer from being read, as far as the names and the first
    bytes of its files tell: there is none, or one that only the model's own code reads."""
    model_type = str(optional_json(path / "config.json").get("model_type"))
    hint = _CODE_READS_IT.format(_ELSEWHERE.get(model_type, ""))
    file = path / "tokenizer.model"
    if not has_tokenizer(path):
        expected = "tokenizer.json, tokenizer.model, vocab.json or qwen.tiktoken"
        code = (path / "tiktoken.model").is_file()
        return Problem(str(path), "no tokenizer", expected, hint if code else "")
    if file.is_file() and not (path / "tokenizer.json").is_file():
        with contextlib.suppress(OSError), file.open("rb") as opened:  # who reads it will say so
            if is_tiktoken(opened.read(1024)):
                return Problem(str(file), "a tiktoken file", "SentencePiece's", hint)
    return None


def tokenizer_files(path: Path) -> dict[str, Path]:
    """The files that the tokenizer of a model directory and its chat templates are read from, and
    what stands beside them, by their names in it."""
    files = [
        *(path / name for name in (*_FILES, *PROCESSOR_FILES)),
        *sorted((path / TEMPLATES).glob("*.jinja")),
    ]
    return {file.relative_to(path).as_posix(): file for file in files if file.is_file()}


def tokenizer_placeholders(path: Path) -> list[Problem]:
    """What lies in the place of the tokenizer's files of a model directory, without reading one of
    them whole."""
    return [problem for file in tokenizer_files(path).values() if (problem := placeholder_at(file))]


def special_tokens(path: Path) -> dict[str, str]:
    """The tokens of the roles (`bos_token`, `eos_token`, …) that the tokenizer's files or
    config.json name. Raises ModelError."""
    return all_roles(load(path), optional_json(path / "config.json"))


def all_roles(loaded: Loaded, model_config: Json) -> dict[str, str]:
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


def load(path: Path) -> Loaded:
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
            problem = tokenizer_problem(path)
            hint = (problem and problem.hint) or "Is the download complete?"
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
    rows = optional_json(path / "config.json").get("vocab_size")
    if not isinstance(rows, int) or isinstance(rows, bool):
        return
    # Added tokens may lie beyond the embedding: people add a padding token that the model never
    # sees.
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    largest = max((i for token, i in vocab.items() if token not in added), default=-1)
    if largest >= rows:
        problem, expected = (
            f"token ids up to {largest}",
            f"less than vocab_size {rows} of config.json",
        )
        raise ModelError(Problem(f"{path} tokenizer", problem, expected, "Is it another model's?"))


def _from_json(path: Path) -> Loaded:
    file = path / "tokenizer.json"
    text = file_text(file)
    tokenizer = guarded(
        file, "a tokenizer that the tokenizers library can read", lambda: Tokenizer.from_str(text)
    )
    if (
        isinstance(tokenizer.model, models.BPE)
        and tokenizer.model.unk_token is None
        and _splits_bytes(tokenizer)
    ):
        check_bytes(file, tokenizer.get_vocab())
    declared = read_declared(path)
    roles = dict(declared.roles)
    unknown = getattr(tokenizer.model, "unk_token", None)
    if isinstance(unknown, str):
        roles.setdefault("unk_token", unknown)
    return Loaded(tokenizer, roles, made=False)


def _splits_bytes(tokenizer: Tokenizer) -> bool:
    """Whether a text becomes bytes in GPT-2's characters before it is looked up."""
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


_READERS: dict[str, Callable[[Path], Loaded]] = {
    "tokenizer.json": _from_json,
    "tokenizer.model": from_sentencepiece,
    "qwen.tiktoken": from_tiktoken,
    "vocab.json": from_vocab,
}
