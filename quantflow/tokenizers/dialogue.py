"""Dialogue formats of families whose tokenizers carry none, as Jinja templates in the manner of
transformers' chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ChatTemplate:
    """A model's own dialogue format: Jinja templates by name. transformers knows two names,
    `default`, and `tool_use` for where tools are given; a model with one template has it as
    `default`."""

    templates: Mapping[str, str]

    @property
    def default(self) -> str | None:
        return self.templates.get("default")

    @property
    def tool_use(self) -> str | None:
        """What is rendered where tools are given."""
        return self.templates.get("tool_use", self.default)


@dataclass(frozen=True)
class Dialogue:
    """template: Jinja over `messages`, `add_generation_prompt` and the special tokens. end: the
    token that ends the model's turn; "": the text's own end token."""

    template: str
    end: str = ""


_INTERNLM_SYSTEM = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\\n- InternLM (书生·浦语) is a"
    " conversational language model that is developed by Shanghai AI Laboratory"
    " (上海人工智能实验室). It is designed to be helpful, honest, and harmless.\\n- InternLM"
    " (书生·浦语) can understand and communicate fluently in the language chosen by the user such"
    " as English and 中文."
)
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user\\'s questions."
)
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{"
    " '<|im_start|>assistant\\n' }}{% endif %}"
)


def _system(text: str) -> str:
    """A first part for dialogues without a system message."""
    return "{% if messages and messages[0]['role'] != 'system' %}{{ '" + text + "' }}{% endif %}"


DIALOGUES: dict[str, Dialogue] = {
    "chatml": Dialogue(_CHATML, "<|im_end|>"),
    "internlm": Dialogue(
        "{{ bos_token }}"
        + _system(f"<|System|>:{_INTERNLM_SYSTEM}\\n")
        + "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|System|>:' +"
        " message['content'] + '\\n' }}{% elif message['role'] == 'user' %}{{ '<|User|>:' +"
        " message['content'] + '\\n' }}{% elif message['role'] == 'assistant' %}{{ '<|Bot|>:' +"
        " message['content'] + '<eoa>\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt"
        " %}{{ '<|Bot|>:' }}{% endif %}",
        "<eoa>",
    ),
    "internlm2": Dialogue("{{ bos_token }}" + _CHATML, "<|im_end|>"),
    "qwen": Dialogue(
        _system("<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n") + _CHATML,
        "<|im_end|>",
    ),
    "vicuna": Dialogue(
        "{{ bos_token }}"
        + _system(f"{_VICUNA_SYSTEM} ")
        + "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] +"
        " ' ' }}{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}{%"
        " elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token"
        " }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "llama2": Dialogue(
        "{% set system = messages[0]['content'] if messages and messages[0]['role'] == 'system'"
        " else '' %}{% for message in (messages[1:] if system else messages) %}{% if"
        " message['role'] == 'user' %}{% set opening = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n'"
        " if loop.first and system else '' %}{{ bos_token + '[INST] ' + opening +"
        " message['content'] | trim + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '"
        " + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "baichuan": Dialogue(
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content']"
        " }}{% elif message['role'] == 'user' %}{{ '<reserved_106>' + message['content'] }}{% elif"
        " message['role'] == 'assistant' %}{{ '<reserved_107>' + message['content'] }}{% endif %}{%"
        " endfor %}{% if add_generation_prompt %}{{ '<reserved_107>' }}{% endif %}"
    ),
}
"""By the name that a user gives; a chat template of the model's own goes first unless one is asked
for."""

OF_FAMILY = {name: DIALOGUES[name] for name in ("internlm", "internlm2", "qwen", "baichuan")}
"""By config.json's model_type: families whose dialogue format is in their remote code alone."""
