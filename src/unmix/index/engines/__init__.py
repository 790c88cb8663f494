"""Who runs the shards of a build: this process, several of them, or a Ray cluster. Imports are lazy."""
