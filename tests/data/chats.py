"""Chat templates of the shapes that models are published with, in words of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
"""Begins with BOS, trims contents."""
TURNS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}"
    "<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ (first if loop.first else '') + m['content'] | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
"""The system's words stand in the first turn of the user; roles must alternate."""
GENERATED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "\n{% endfor %}"
)
"""Says itself what the assistant generates."""
REASONING = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% set last = namespace(user=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<result>\n{{ m.content }}\n</result><|im_end|>\n"
    "{% elif m.role == 'assistant' %}{% set answer = m.content or '' %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in answer %}{% set thought = answer.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set answer = answer.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n{% if loop.index0 > last.user %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ answer }}"
    '{% for c in m.tool_calls or [] %}\n<call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</call>{% endfor %}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Leaves out the thinking of earlier turns; calls tools, and shows their results as the user's."""
TWICE = "{% for m in messages %}{{ m.role }}: {{ m.content }} ({{ m.content }})\n{% endfor %}"
COUNTED = "{% for m in messages %}{{ m.role }}, {{ m.content | length }} characters: {{ m.content }}\n{% endfor %}"

SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>", "<turn>", "<end>", "<think>", "</think>",
    "<call>", "</call>",
)  # fmt: skip


def chat_tokenizer(folder: Path, template: str | None = None) -> Any:
    """The tiny tokenizer with the special tokens of these templates, and one of them as its own."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = template
    return tokenizer


TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "  Which town is user assistant system of France? "},
    {"role": "assistant", "content": "Paris"},
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": "Is that a question?\n"},
]
"""Its words stand in the templates too, and blanks are to be trimmed."""
