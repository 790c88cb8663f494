"""Clients of language-model services. One file a protocol; all of them look like `Client`."""

from __future__ import annotations

from unmix.core.plugins import Registry

CLIENTS = Registry(
    "unmix.clients",
    "client",
    {"openai": "unmix.explain.clients.openai:OpenAIClient"},
)
