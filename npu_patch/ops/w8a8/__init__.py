"""Products of int8 weights with inputs that are quantised at run time."""
