"""A plain copy of a model with int8 weights."""
