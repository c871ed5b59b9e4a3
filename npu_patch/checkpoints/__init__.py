"""Models as they lie on disk: safetensors files, shards, and what says which of their weights are quantised."""
