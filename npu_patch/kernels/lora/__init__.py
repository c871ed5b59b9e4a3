"""Low-rank adapters in Triton: all that surrounds a frozen product, for the adapters of a group that share its input."""
