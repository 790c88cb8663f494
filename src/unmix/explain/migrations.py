"""The ledger's schema as named steps. Steps are only ever appended; a released one never changes."""

from __future__ import annotations

MIGRATIONS: tuple[tuple[str, str], ...] = (
    (
        "0001_explanations_and_scores",
        """
        CREATE TABLE explanations (
            id INTEGER PRIMARY KEY,
            coder TEXT NOT NULL,
            coder_hash TEXT NOT NULL,
            index_hash TEXT NOT NULL,
            latent INTEGER NOT NULL,
            method TEXT NOT NULL,
            config_hash TEXT NOT NULL,
            sample INTEGER NOT NULL,
            config TEXT NOT NULL,
            status TEXT NOT NULL CHECK (status IN ('pending', 'running', 'done', 'failed')),
            owner TEXT,
            attempts INTEGER NOT NULL DEFAULT 0,
            error TEXT,
            message TEXT,
            text TEXT,
            data TEXT,
            raw TEXT,
            prompt_tokens INTEGER NOT NULL DEFAULT 0,
            completion_tokens INTEGER NOT NULL DEFAULT 0,
            cost REAL,
            updated TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
            UNIQUE (coder_hash, index_hash, latent, method, config_hash, sample),
            CHECK ((status = 'done') = (text IS NOT NULL)),
            CHECK ((status = 'failed') = (error IS NOT NULL)),
            CHECK ((status = 'running') = (owner IS NOT NULL))
        );
        CREATE INDEX explanations_by_latent ON explanations (latent);
        CREATE TABLE scores (
            id INTEGER PRIMARY KEY,
            explanation_id INTEGER NOT NULL REFERENCES explanations (id),
            index_hash TEXT NOT NULL,
            method TEXT NOT NULL,
            config_hash TEXT NOT NULL,
            sample INTEGER NOT NULL,
            config TEXT NOT NULL,
            status TEXT NOT NULL CHECK (status IN ('pending', 'running', 'done', 'failed')),
            owner TEXT,
            attempts INTEGER NOT NULL DEFAULT 0,
            error TEXT,
            message TEXT,
            figures TEXT,
            counted TEXT,
            raw TEXT,
            prompt_tokens INTEGER NOT NULL DEFAULT 0,
            completion_tokens INTEGER NOT NULL DEFAULT 0,
            cost REAL,
            updated TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
            UNIQUE (explanation_id, index_hash, method, config_hash, sample),
            CHECK ((status = 'done') = (figures IS NOT NULL)),
            CHECK ((status = 'failed') = (error IS NOT NULL)),
            CHECK ((status = 'running') = (owner IS NOT NULL))
        );
        """,
    ),
)
