"""Models with int8 weights."""
