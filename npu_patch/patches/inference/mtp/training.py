"""What a head is trained by: of each token the one after the next, from the state of the frozen model and the next."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_patch.ops import chunked_loss
from npu_patch.ops.head_products import Cast, Logits, Product, Term
from npu_patch.ops.token_losses import reference

NO_LABEL = -100


def states_of(model: Any, input_ids: Tensor, **given: Any) -> Tensor:
    """What a head sees of the model: its last hidden states `[B, T, H]`, after the last norm, without gradients."""
    with torch.no_grad():
        states: Tensor = model.get_decoder()(input_ids=input_ids, use_cache=False, **given).last_hidden_state
    return states


def predicted_states(head: Any, states: Tensor, input_ids: Tensor) -> Tensor:
    """The head's states `[B, T - 1, H]` at each token but the last: of the token after the next."""
    positions = torch.arange(1, input_ids.shape[1], device=input_ids.device)[None].expand(input_ids.shape[0], -1)
    found: Tensor = head.forward_layer(0, states[:, :-1], positions, None, input_ids=input_ids[:, 1:])
    return found


def accepted(head: Any, model: Any, states: Tensor, input_ids: Tensor) -> Tensor:
    """The share of a text's tokens, from the third on, for which head and model have the same one in mind."""
    output = model.get_output_embeddings()
    with torch.no_grad():
        drafts = output(predicted_states(head, states, input_ids)).argmax(-1)
        return (drafts == output(states[:, 1:]).argmax(-1)).float().mean()


def loss(head: Any, model: Any, states: Tensor, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
    """The mean over the labels `[B, T]` (the tokens themselves, if none are given) that are not NO_LABEL; no logits.

    Raises:
        ValueError: for fewer tokens than three, which have none after the next.
    """
    if input_ids.shape[1] < 3:
        raise ValueError(f"{input_ids.shape[1]} tokens: of the token after the next a head learns from three or more")
    of = (input_ids if labels is None else labels)[:, 2:]
    rows = predicted_states(head, states, input_ids)[:, :-1]
    output = model.get_output_embeddings()
    if type(output) is not torch.nn.Linear:  # adapted
        return F.cross_entropy(output(rows).float().flatten(0, 1), of.flatten(), ignore_index=NO_LABEL)
    logits = Logits((Term(rows, output.weight, output.bias),), Cast(Product(), torch.float32))
    return chunked_loss.cross_entropy(logits, of.reshape(rows.shape[:-1]), reference, ignore_index=NO_LABEL)
