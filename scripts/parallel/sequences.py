"""npu_patch.sequence_parallel, under torch's engines that average the gradients of the ranks."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from npu_patch.sequence_parallel import SequenceParallel

from .case import Case, Engine, Step, counting, gradients, ids, mean_over_ranks, npu
from .torchs import sharded


def divided(case: Case, wrap: Callable[[nn.Module], nn.Module]) -> Step:
    model = case.built()
    parallel = SequenceParallel(model)
    model = wrap(model)
    try:
        with counting(), parallel.part(input_ids=ids(), labels=ids()) as part:
            loss = model(**part).loss
            loss.backward()
    finally:
        parallel.close()
    return {"loss": mean_over_ranks(loss), **gradients(model)}


def over_ddp(case: Case) -> Step:
    return divided(case, lambda model: case.after(DistributedDataParallel(model, device_ids=[npu().index])))


def over_fsdp2(case: Case) -> Step:
    return divided(case, lambda model: sharded(case, model))


ENGINES = (
    Engine("npu_patch.sequence_parallel, DDP", over_ddp, adapters=True),
    Engine("npu_patch.sequence_parallel, FSDP2", over_fsdp2, adapters=True),
)
