"""Low-rank adapters in Triton: all that surrounds the frozen products of linears that share an input."""
