"""DeepSpeed, where it is installed: it is no dependency of the tests. `DS_BUILD_OPS=0 pip install deepspeed` builds
nothing."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor, nn

from npu_patch import simulator

from .case import Case, Engine, Step, counting, ids, mean_over_ranks, mine, npu, rank, whole, without_wrappers, world

MISSING = None if importlib.util.find_spec("deepspeed") else "DeepSpeed: the package deepspeed is not installed"


def configuration(stage: int) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def imported() -> Any:
    if simulator.is_active():  # CANN's; which torch_npu is there without, here
        os.environ.setdefault("ASCEND_HOME_PATH", "simulated")
    import deepspeed

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("hccl", auto_mpi_discovery=False)
    return deepspeed


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.0)


def found(model: nn.Module, loss: Tensor) -> Step:
    from deepspeed.utils import safe_get_full_grad

    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    gradients = {without_wrappers(name): whole(safe_get_full_grad(parameter)) for name, parameter in trained}
    return {"loss": mean_over_ranks(loss), **gradients}


def zero(case: Case, stage: int) -> Step:
    model = case.built()
    engine, *_ = imported().initialize(model=model, optimizer=optimizer(model), config=configuration(stage))
    case.after(model)
    try:
        with counting():
            loss = engine(input_ids=mine(), labels=mine(), use_cache=False).loss
            engine.backward(loss)
        return found(model, loss)
    finally:
        engine.destroy()


def zero2(case: Case) -> Step:
    return zero(case, 2)


def zero3(case: Case) -> Step:
    return zero(case, 3)


def one_row(batch: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens as one sequence, with the token that follows each."""
    batch = batch.reshape(1, -1)
    labels = batch.roll(-1, 1)
    labels[0, -1] = batch[0, 0]
    return batch, labels


def ulysses(case: Case) -> Step:
    """accelerate's sp_size: DeepSpeed's attention around the registry's. One row, of which each rank has a part."""
    imported()
    model = case.built()
    engine, _ = accelerator().prepare(model, optimizer(model))
    case.after(model)
    batch, labels = one_row(ids())
    positions = torch.arange(batch.shape[1], device=npu())[None]
    own = slice(rank() * batch.shape[1] // world(), (rank() + 1) * batch.shape[1] // world())
    given = {"position_ids": positions[:, own], "labels": labels[:, own], "shift_labels": labels[:, own]}
    with counting():
        loss = engine(input_ids=batch[:, own], **given, use_cache=False).loss
        engine.backward(loss / world())  # gradients are summed; accelerate's backward would take a step at once
    return found(model, loss)


def accelerator() -> Any:
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DeepSpeedSequenceParallelConfig, ParallelismConfig

    handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")
    parallelism = ParallelismConfig(sp_size=world(), sp_backend="deepspeed", sp_handler=handler)
    return Accelerator(parallelism_config=parallelism, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=configuration(2)))


ENGINES = (
    Engine("DeepSpeed, ZeRO-2", zero2, adapters=True),
    Engine("DeepSpeed, ZeRO-3", zero3, adapters=True),
)
