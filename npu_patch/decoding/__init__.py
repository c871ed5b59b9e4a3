"""Decoding within the training process: steps that are captured once and replayed."""
