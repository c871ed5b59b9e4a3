"""Speculative decoding for models with a recurrent state, and the heads of several tokens that they ship."""
