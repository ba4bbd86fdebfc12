"""The chat templates of a model directory or a GGUF file: where they stand, and which counts."""

from __future__ import annotations

from pathlib import Path

from quantflow.checkpoints.gguf.header import read_metadata
from quantflow.errors import ModelError, Problem
from quantflow.tokenizers.dialogue import OF_FAMILY, ChatTemplate, Dialogue
from quantflow.tokenizers.reading import file_text, optional_json

# transformers' folder for those that are not the default one
TEMPLATES = "additional_chat_templates"


def chat_template(path: Path) -> ChatTemplate | None:
    """The model's own dialogue format: in files of their own, in tokenizer_config.json, or its
    family's. None for a base model.

    As in transformers, files take the place of what tokenizer_config.json says; where no file is
    the default one, they add to it. Raises ModelError.
    """
    files = template_files(path)
    if "default" not in files:
        files = {**named_templates(path / "tokenizer_config.json"), **files}
    family = None if files else family_dialogue(path)
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
        if "default" in named_templates(file):
            return f"{file} chat_template"
    return str(path)  # its family's


def turn_end(path: Path) -> str:
    """The token that ends the model's turn where its family's dialogue format says so; "": none but
    the text's own."""
    family = family_dialogue(path)
    return family.end if family else ""


def family_dialogue(path: Path) -> Dialogue | None:
    # how the first Qwen marks a base model
    raw_prompts = optional_json(path / "generation_config.json").get("chat_format") == "raw"
    return (
        None
        if raw_prompts
        else OF_FAMILY.get(str(optional_json(path / "config.json").get("model_type")))
    )


def template_files(source: Path) -> dict[str, str]:
    """The chat templates that stand in files of their own, or in GGUF's metadata, by name."""
    if source.is_file():
        prefix = "tokenizer.chat_template"
        entries = {
            key.removeprefix(prefix): text
            for key, text in read_metadata(source).items()
            if key.startswith(prefix)
        }
        return {
            name[1:] or "default": text
            for name, text in entries.items()
            if name[:1] in ("", ".") and isinstance(text, str) and text
        }
    files = {
        file.stem: file for file in sorted((source / TEMPLATES).glob("*.jinja")) if file.is_file()
    }
    if (source / "chat_template.jinja").is_file():
        files["default"] = source / "chat_template.jinja"
    templates = {name: file_text(file) for name, file in files.items()}
    if "default" in templates:
        return templates
    return {**named_templates(source / "chat_template.json"), **templates}


def named_templates(file: Path) -> dict[str, str]:
    """What `chat_template` says in a JSON file: one template, or several with their names. Raises
    ModelError for any other shape."""
    value = optional_json(file).get("chat_template")
    if not value:
        return {}
    if isinstance(value, str):
        return {"default": value}
    entries = (
        [(t.get("name"), t.get("template")) if isinstance(t, dict) else (None, None) for t in value]
        if isinstance(value, list)
        else (list(value.items()) if isinstance(value, dict) else [(None, None)])
    )
    if any(not isinstance(name, str) or not isinstance(text, str) for name, text in entries):
        raise ModelError(
            Problem(
                f"{file} chat_template",
                repr(value)[:80],
                "a template, or a list of objects with name and template",
            )
        )
    return dict(entries)
