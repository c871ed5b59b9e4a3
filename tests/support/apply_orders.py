"""When `apply` is called, of the steps that make a model ready to train. Each gives the patched model, training."""

from __future__ import annotations

from collections.abc import Callable

import torch

import npu_patch

Make = Callable[[], torch.nn.Module]


def apply_before_the_model(make: Make) -> torch.nn.Module:
    npu_patch.apply()
    return make().train()


def apply_beside_the_model(make: Make) -> torch.nn.Module:
    """Its layers are there already, and not given: nothing can be seen of them before they are called."""
    model = make().train()
    npu_patch.apply()
    return model


def apply_to_the_evaluating_model(make: Make) -> torch.nn.Module:
    """As from_pretrained leaves it."""
    model = make().eval()
    npu_patch.apply(model)
    return model.train()


def apply_to_the_training_model(make: Make) -> torch.nn.Module:
    model = make().train()
    npu_patch.apply(model)
    return model


def apply_twice(make: Make) -> torch.nn.Module:
    """As a script does that calls it at its start and with its model."""
    return apply_to_the_training_model(lambda: apply_before_the_model(make))


ORDERS = (
    apply_before_the_model,
    apply_beside_the_model,
    apply_to_the_evaluating_model,
    apply_to_the_training_model,
)
