"""Ways to train that put hooks or modes of their own around a forward and its backward."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts


@contextlib.contextmanager
def _checkpointed(model: torch.nn.Module, **arguments: Any) -> Iterator[None]:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    if hasattr(model, "peft_config"):
        model.enable_input_require_grads()
    yield
    model.gradient_checkpointing_disable()


def _products_are_saved(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = operator in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def _everything_is_saved(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_SAVE


def _selective(policy: Callable[..., CheckpointPolicy], **arguments: Any) -> dict[str, Any]:
    contexts = functools.partial(create_selective_checkpoint_contexts, policy, **arguments)
    return {"use_reentrant": False, "context_fn": contexts}


@contextlib.contextmanager
def _hooks_for_the_npu_alone(model: torch.nn.Module) -> Iterator[None]:
    """A user's, who knows that nothing of the model is on the CPU, but for the seeds of attention's dropout."""

    def pack(saved: Tensor) -> tuple[Tensor, torch.Size]:
        if saved.device.type != "npu" and saved.numel() > 1:
            raise AssertionError(f"somebody keeps a tensor on the {saved.device.type} in the model's forward")
        return saved.detach().clone(), saved.shape

    with saved_tensors_hooks(pack, lambda packed: packed[0].view(packed[1])):
        yield


ROUTERS = {"allow_cache_entry_mutation": True}  # transformers' write into what they computed
MODES: dict[str, Callable[[torch.nn.Module], contextlib.AbstractContextManager[Any]]] = {
    "non-reentrant": functools.partial(_checkpointed, use_reentrant=False),
    "reentrant": functools.partial(_checkpointed, use_reentrant=True),
    "selective": functools.partial(_checkpointed, **_selective(_products_are_saved)),
    "selective, everything": functools.partial(_checkpointed, **_selective(_everything_is_saved, **ROUTERS)),
    "save_on_cpu": lambda model: save_on_cpu(),
    "user hooks": _hooks_for_the_npu_alone,
}
