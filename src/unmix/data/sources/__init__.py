"""Where text comes from: one file a kind, every class of the same shape (`unmix.data.sources.base.Source`)."""

from __future__ import annotations

from unmix.core.plugins import Registry

SOURCES = Registry(
    "unmix.sources",
    "text source",
    {
        "builtin": "unmix.data.sources.python_docs:PythonDocs",
        "hub": "unmix.data.sources.hub:HubDataset",
        "folder": "unmix.data.sources.folder:Folder",
        "text": "unmix.data.sources.text:TextFile",
        "jsonl": "unmix.data.sources.jsonl:JsonLines",
        "parquet": "unmix.data.sources.parquet:Parquet",
        "ids": "unmix.data.sources.id_array:IdArray",
    },
)
