"""Generation within the training process."""
