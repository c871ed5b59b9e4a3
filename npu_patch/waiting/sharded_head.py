"""A head that torch's `fully_shard` has in a unit of its own, as transformers and accelerate shard models.

Where the unit keeps its weights from the forward to the backward (`reshard_after_forward=False`), the loss finds them:
its hooks gather them before the head is called, and run in the backward, where logits that wait have no gradient, too.
"""

from __future__ import annotations

import torch

FSDP = "torch.distributed.fsdp"


def keeps_its_weights(head: torch.nn.Module) -> bool:
    """Whether nobody but such a unit listens to it."""
    hooks = (*head._forward_hooks.values(), *head._forward_pre_hooks.values())
    if head._backward_hooks or head._backward_pre_hooks or "forward" in head.__dict__ or not hooks:
        return False
    if not all(str(getattr(hook, "__module__", "")).startswith(FSDP) for hook in hooks):
        return False
    get_state = getattr(head, "_get_fsdp_state", None)
    if get_state is None:
        return False
    state = get_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # up to torch 2.10 there is one
        groups = [each for each in (getattr(state, "_fsdp_param_group", None),) if each is not None]
    return bool(groups) and all(each.post_forward_mesh_info is None for each in groups)
