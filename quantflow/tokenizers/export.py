"""The tokenizer files of an artifact: all that a loader without remote code needs."""

from __future__ import annotations

import json
from pathlib import Path

from quantflow.checkpoints.directory import read_file
from quantflow.paths import naming, write_text
from quantflow.tokenizers.chat_templates import family_dialogue, named_templates, template_files
from quantflow.tokenizers.load import all_roles, load
from quantflow.tokenizers.loaded import Loaded
from quantflow.tokenizers.reading import Json, optional_json

# every transformers has it, and it takes tokenizer.json as it is
FAST_CLASS = "PreTrainedTokenizerFast"

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


def export_tokenizer(source: Path, target: Path) -> list[str]:
    """The names of the files written to `target`, sorted: all a loader without remote code needs,
    and nothing else.

    tokenizer.json is copied, or made where the source has another kind of vocabulary; the
    configurations lose what names remote code or files. The same source gives the same bytes.
    Raises ModelError; an OSError of the target is the caller's.
    """
    # What the source has.
    loaded = load(source)
    model_config = optional_json(source / "config.json")
    tokenizer_config = optional_json(source / "tokenizer_config.json")
    generation_config = optional_json(source / "generation_config.json")
    special_tokens_map = optional_json(source / "special_tokens_map.json")
    added_tokens = optional_json(source / "added_tokens.json")
    templates = template_files(source)

    # The configuration: roles, and nothing that names remote code or files.
    for role, token in all_roles(loaded, model_config).items():
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

    # The chat templates, or the family's own dialogue format.
    if set(templates) - {"default"}:  # a list, since older loaders do not know the folder
        named = (
            {**named_templates(source / "tokenizer_config.json"), **templates}
            if "default" not in templates
            else templates
        )
        tokenizer_config["chat_template"] = [
            {"name": name, "template": text} for name, text in sorted(named.items())
        ]
    chat = family_dialogue(source)
    if chat and not templates and not tokenizer_config.get("chat_template"):
        tokenizer_config["chat_template"] = chat.template
        generation_config = _ending_turns(generation_config, chat.end, loaded, special_tokens_map)

    # The files.
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
