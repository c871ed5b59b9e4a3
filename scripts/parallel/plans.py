"""transformers' own plans, by DistributedConfig, and accelerate's."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM

from .case import (
    Case,
    Change,
    Engine,
    Step,
    counting,
    evaluated,
    gradients,
    ids,
    mean_over_ranks,
    mine,
    npu,
    plain,
    rank,
    step,
    with_adapters,
    world,
)
from .torchs import decoder


@functools.cache
def stored(family: str, change: Change | None) -> str:
    """A folder with the model of `plain`, the same on every rank."""
    folder: list[str | None] = [tempfile.mkdtemp() if rank() == 0 else None]
    dist.broadcast_object_list(folder, src=0)
    path = str(Path(folder[0] or "") / family)
    if rank() == 0:
        plain(family, lora=False, change=change).save_pretrained(path)
    dist.barrier()
    return path


def loaded(case: Case, **distributed: Any) -> nn.Module:
    """Patched before: transformers' classes and functions are, as the model is made in parallel."""
    from transformers.distributed.configuration_utils import DistributedConfig

    import npu_patch

    if case.when == "before":
        case.report = npu_patch.apply()
    model = AutoModelForCausalLM.from_pretrained(
        stored(case.family, case.change), dtype=torch.float32, distributed_config=DistributedConfig(**distributed)
    )
    return case.after((with_adapters(model) if case.lora else model).train())


def tensor_parallel(case: Case) -> Step:
    return step(loaded(case, tp_size=world()), ids())


def own_fsdp(case: Case) -> Step:
    return step(loaded(case, fsdp_size=world()), mine())


def experts_all_to_all(case: Case) -> Step:
    return step(loaded(case, tp_size=world(), ep_size=world(), ep_implementation="all_to_all"), ids())


def experts_all_reduce(case: Case) -> Step:
    return step(loaded(case, tp_size=world(), ep_size=world(), ep_implementation="all_reduce"), ids())


def tensor_parallel_evaluated(case: Case) -> Step:
    return evaluated(loaded(case, tp_size=world()), ids())


def experts_evaluated(case: Case) -> Step:
    """By "auto": as they are reached at inference."""
    return evaluated(loaded(case, tp_size=world(), ep_size=world()), ids())


def own_pipeline_evaluated(case: Case) -> Step:
    """It passes no gradients on."""
    return evaluated(loaded(case, pp_size=world()), ids())


def experts_and_fsdp(case: Case) -> Step:
    return step(loaded(case, fsdp_size=world(), ep_size=world()), mine())


# ---- accelerate ----


def accelerator(model: nn.Module, **parallel: int) -> Any:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import ParallelismConfig

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[type(decoder(model).layers[0]).__name__],
    )
    return Accelerator(parallelism_config=ParallelismConfig(**parallel), fsdp_plugin=plugin)


def prepared(case: Case, **parallel: int) -> tuple[Any, nn.Module]:
    model = case.before(plain(case.family, case.lora))
    its = accelerator(model, **parallel)
    model, _ = its.prepare(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]))
    return its, case.after(model)


def accelerate_fsdp(case: Case) -> Step:
    _, model = prepared(case, dp_shard_size=world())
    return step(model, mine())


def context_parallel(case: Case) -> Step:
    """One row, of which each rank has some tokens: accelerate's cp_size."""
    its, model = prepared(case, cp_size=world())
    batch = ids().reshape(1, -1)
    labels = batch.roll(-1, 1)
    labels[0, -1] = batch[0, 0]
    positions = torch.arange(batch.shape[1], device=npu())[None]
    buffers = [batch, labels, positions]
    sharding = its.maybe_context_parallel(buffers=buffers, buffer_seq_dims=[1, 1, 1], no_restore_buffers=set(buffers))
    with sharding, counting():
        given = {"position_ids": positions, "labels": labels, "shift_labels": labels}
        loss = model(input_ids=batch, **given, use_cache=False).loss
        its.backward(loss)
    return {"loss": mean_over_ranks(loss), **gradients(model)}


def to_the_first_experts(model: nn.Module) -> None:
    """Every token to experts 0 and 1: the other ranks of expert parallelism get none."""
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] += 0.5
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[0] = 1.0
            layer.mlp.gate.weight[:2, 0] = 0.5
            layer.mlp.gate.weight[2:, 0] = -0.5


MIXTURES = ("qwen3_moe",)
ENGINES = (
    Engine("transformers, tp_plan", tensor_parallel),
    Engine("transformers, FSDP2", own_fsdp),
    Engine("transformers, tp_plan and experts all_to_all", experts_all_to_all, MIXTURES),
    Engine("transformers, tp_plan and experts all_reduce", experts_all_reduce, MIXTURES),
    Engine("transformers, experts and FSDP2", experts_and_fsdp, MIXTURES),
    Engine("the same, ranks without tokens", experts_and_fsdp, MIXTURES, change=to_the_first_experts),
    Engine("all_reduce, ranks without tokens", experts_all_reduce, MIXTURES, change=to_the_first_experts),
    Engine("transformers, tp_plan, evaluated", tensor_parallel_evaluated, evaluates=True),
    Engine("transformers, experts, evaluated", experts_evaluated, MIXTURES, evaluates=True),
    Engine("transformers, pipeline, evaluated", own_pipeline_evaluated, evaluates=True),
    Engine("accelerate, FSDP2", accelerate_fsdp, adapters=True),
    Engine("accelerate, context parallel", context_parallel, adapters=True, in_one_row=True),
)
