"""The model as transformers' own head takes it, which its configuration knows nothing of: a stand-in that has the
number and kind of the head's layers beside it. The model and its configuration stay as they are."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

FULL = "full_attention"


@dataclass(frozen=True)
class _Decoder:
    """`layers`: one of those that the head's is to be like."""

    layers: tuple[Any, ...]
    rotary_emb: Any


class Trunk:
    """Everything of the model, but for its `config` and what of its decoder the head is made of."""

    def __init__(self, model: Any, sparse: bool | None = None, drafts: int = 1) -> None:
        """`sparse`: whether the head's layer has experts; None: as the model's first one. `drafts`: how often its layer
        is asked, one after the other.

        Raises:
            ValueError: if the model has no layer of full attention.
        """
        self.model = model
        decoder = model.get_decoder()
        kinds = list(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
        if FULL not in kinds:
            raise ValueError(
                f"{type(model).__name__} has no layer of full attention, which a head is made like: {kinds}"
            )
        self._decoder = _Decoder((decoder.layers[kinds.index(FULL)],), decoder.rotary_emb)
        self.config = _with_head(model, sparse, drafts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def get_decoder(self) -> Any:
        return self._decoder


def _with_head(model: Any, sparse: bool | None, drafts: int) -> Any:
    config = copy.deepcopy(model.config)
    config.dtype = model.get_input_embeddings().weight.dtype
    text = config.get_text_config(decoder=True)
    text.dtype = config.dtype
    text.num_mtp_layers, text.mtp_layer_types = drafts, [FULL] * drafts
    if sparse is not None and hasattr(text, "mlp_only_layers"):
        text.mlp_only_layers, text.decoder_sparse_step = ([], 1) if sparse else ([0], 1)
    return config
