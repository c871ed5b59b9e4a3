"""One module per op: the variants it knows with their references in plain torch, and the implementations that serve
them. Nothing here knows transformers."""
