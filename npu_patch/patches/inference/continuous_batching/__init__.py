"""transformers' continuous batching (`generate_batch`) on the NPU."""
