"""torch's own engines."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from .case import (
    Case,
    Engine,
    Step,
    counting,
    gradients,
    ids,
    mean_over_ranks,
    mine,
    npu,
    rank,
    step,
    whole,
    without_wrappers,
    world,
)


def decoder(model: nn.Module) -> nn.Module:
    """What has the layers, under peft or not."""
    return next(module for module in model.modules() if hasattr(module, "layers"))


# ---- DistributedDataParallel ----


def data_parallel(case: Case, **options: bool) -> DistributedDataParallel:
    return case.after(DistributedDataParallel(case.built(), device_ids=[npu().index], **options))


def ddp(case: Case) -> Step:
    return step(data_parallel(case), mine())


def ddp_static_graph(case: Case) -> Step:
    """Two steps: the first one learns the graph."""
    model = data_parallel(case, static_graph=True)
    step(model, mine())
    model.zero_grad()
    return step(model, mine())


def ddp_no_sync(case: Case) -> Step:
    """Row after row, and the gradients are averaged once."""
    model = data_parallel(case)
    first, second = (mine()[i : i + 1] for i in range(2))
    with counting():
        with model.no_sync():
            one = model(input_ids=first, labels=first).loss / 2
            one.backward()
        two = model(input_ids=second, labels=second).loss / 2
        two.backward()
    return {"loss": mean_over_ranks(one + two), **gradients(model)}


def ddp_fp16_hook(case: Case) -> Step:
    model = data_parallel(case)
    model.register_comm_hook(None, fp16_compress_hook)
    return step(model, mine())


# ---- FSDP ----


def sharded(case: Case, model: nn.Module, **options: object) -> nn.Module:
    for layer in decoder(model).layers:
        fully_shard(layer, **options)
    return case.after(fully_shard(model, **options))


def fsdp2(case: Case) -> Step:
    return step(sharded(case, case.built()), mine())


def fsdp2_two_forwards(case: Case) -> Step:
    """Then two backwards; the head is a unit of its own, as transformers and accelerate shard models."""
    model = case.built()
    head = [module for name, module in model.named_modules() if name.endswith(("model.norm", "lm_head"))]
    fully_shard(head, reshard_after_forward=False)
    model = sharded(case, model)
    rows = mine()
    with counting():
        losses = [model(input_ids=row[None], labels=row[None], use_cache=False).loss / 2 for row in rows]
        for loss in losses:
            loss.backward()
    return {"loss": mean_over_ranks(sum(losses)), **gradients(model)}


def fsdp2_checkpointed(case: Case) -> Step:
    model = case.built()
    layers = decoder(model).layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer)
    return step(sharded(case, model), mine())


def fsdp2_gradient_checkpointing(case: Case) -> Step:
    model = case.built()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return step(sharded(case, model), mine())


def fsdp2_cpu_offload(case: Case) -> Step:
    return step(sharded(case, case.built(), offload_policy=CPUOffloadPolicy(pin_memory=False)), mine())


def fsdp2_bfloat16(case: Case) -> Step:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return step(sharded(case, case.built(), mp_policy=policy), mine())


def hsdp(case: Case) -> Step:
    mesh = init_device_mesh("npu", (world() // 2, 2), mesh_dim_names=("replicate", "shard"))
    return step(sharded(case, case.built(), mesh=mesh), mine())


def fsdp1_step(case: Case, use_orig_params: bool) -> tuple[nn.Module, Tensor]:
    model = case.built()
    layers = decoder(model).layers
    for i, layer in enumerate(layers):
        layers[i] = FullyShardedDataParallel(layer, device_id=npu(), use_orig_params=use_orig_params)
    model = case.after(FullyShardedDataParallel(model, device_id=npu(), use_orig_params=use_orig_params))
    with counting():
        loss = model(input_ids=mine(), labels=mine(), use_cache=False).loss
        loss.backward()
    return model, loss


def fsdp1(case: Case) -> Step:
    model, loss = fsdp1_step(case, True)
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        return {"loss": mean_over_ranks(loss), **gradients(model)}


def fsdp1_flat(case: Case) -> Step:
    """All parameters of a layer are one, whose gradient is taken apart here."""
    model, loss = fsdp1_step(case, False)
    found: Step = {}
    for prefix, module in model.named_modules():
        flat = getattr(module, "_flat_param", None)
        if flat is None:
            continue
        together = torch.empty(flat.grad.numel() * world(), device=npu())
        dist.all_gather_single(together, flat.grad)
        parts = together[: sum(flat._numels)].split(flat._numels)
        for name, shape, part in zip(flat._fqns, flat._shapes, parts, strict=True):
            found[without_wrappers(f"{prefix}.{name}").lstrip(".")] = whole(part.view(shape))
    return {"loss": mean_over_ranks(loss), **found}


# ---- checkpoints ----


def saved_and_loaded(case: Case, saving: str) -> Step:
    """Saved by one model, loaded into another of other weights, of which one is patched: it steps like the first."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    folder: list[str | None] = [tempfile.mkdtemp() if rank() == 0 else None]
    dist.broadcast_object_list(folder, src=0)
    path = Path(folder[0] or "") / "checkpoint"

    def of(patched: bool, seed: int) -> tuple[Case, nn.Module]:
        its = case if patched else Case(case.family, case.lora, "never")
        return its, sharded(its, its.built(seed))

    first_is = case.when != "never" and saving == "patched"
    _, first = of(first_is, 0)
    step(first, mine())  # whatever a step leaves behind is saved too
    dcp.save(get_model_state_dict(first), checkpoint_id=path)
    _, second = of(not first_is, 5)
    state = get_model_state_dict(second)
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(second, state)
    return step(second, mine())


def checkpoint_of_patched(case: Case) -> Step:
    return saved_and_loaded(case, "patched")


def checkpoint_of_unpatched(case: Case) -> Step:
    return saved_and_loaded(case, "unpatched")


# ---- tensor parallelism, and norms on shards of the sequence ----


def sequence_parallel_norms(case: Case) -> Step:
    """parallelize_module: between attention and feed-forward each rank has a part of each sequence."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import parallel as tensor

    model, mesh = case.built(), init_device_mesh("npu", (world(),))
    inner, gathered = model.model, {"hidden_states": Replicate()}
    whole_input = tensor.PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": Shard(1)}, desired_input_kwarg_layouts=gathered
    )
    for layer in inner.layers:
        plan = {
            "input_layernorm": tensor.SequenceParallel(),
            "self_attn": whole_input,
            **{f"self_attn.{each}_proj": tensor.ColwiseParallel() for each in "qkv"},
            **{
                f"self_attn.{each}_norm": tensor.SequenceParallel(sequence_dim=2, use_local_output=True)
                for each in "qk"
            },
            "self_attn.o_proj": tensor.RowwiseParallel(output_layouts=Shard(1)),
            "post_attention_layernorm": tensor.SequenceParallel(),
            "mlp": tensor.PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
            "mlp.gate_proj": tensor.ColwiseParallel(),
            "mlp.up_proj": tensor.ColwiseParallel(),
            "mlp.down_proj": tensor.RowwiseParallel(output_layouts=Shard(1)),
        }
        tensor.parallelize_module(layer, mesh, plan)
    ends = {
        "model.embed_tokens": tensor.PrepareModuleOutput(
            output_layouts=Replicate(), desired_output_layouts=Shard(1), use_local_output=True
        ),
        "model.norm": tensor.SequenceParallel(),
        "lm_head": tensor.ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    model = case.after(tensor.parallelize_module(model, mesh, ends))
    positions = torch.arange(ids().shape[1], device=npu())[None]
    with counting():
        loss = model(input_ids=ids(), labels=ids(), position_ids=positions, use_cache=False).loss
        loss.backward()
    return {"loss": mean_over_ranks(loss), **gradients(model)}


# ---- pipelines ----


class Stage(nn.Module):
    """Some of the layers, with the embedding before the first and the head behind the last."""

    def __init__(self, model: nn.Module, start: int, stop: int) -> None:
        super().__init__()
        inner = model.model
        self.config, self.rotary_emb = model.config, inner.rotary_emb
        self.layers = nn.ModuleDict({str(i): inner.layers[i] for i in range(start, stop)})
        self.embed_tokens = inner.embed_tokens if start == 0 else None
        last = stop == len(inner.layers)
        self.norm, self.lm_head = (inner.norm, model.lm_head) if last else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        from transformers.masking_utils import create_causal_mask

        x = x if self.embed_tokens is None else self.embed_tokens(x)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=None, past_key_values=None, position_ids=positions
        )
        tables = self.rotary_emb(x, positions)
        for layer in self.layers.values():
            kind = getattr(layer, "layer_type", getattr(layer, "attention_type", None))
            x = layer(
                x,
                position_embeddings=tables,
                attention_mask=None if kind == "linear_attention" else mask,
                position_ids=positions,
            )
            x = x[0] if isinstance(x, tuple) else x
        return x if self.norm is None else self.lm_head(self.norm(x))


def pipeline(case: Case, schedule: str) -> Step:
    import torch.distributed.pipelining as pipelining

    model = case.built()
    count = len(model.model.layers) // world()
    stage = Stage(model, count * rank(), count * (rank() + 1)).to(npu())
    stage = case.after(stage)
    wrapped = pipelining.PipelineStage(stage, rank(), world(), npu())

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        return model.loss_function(logits=logits, labels=labels, vocab_size=model.config.vocab_size)

    run = getattr(pipelining, schedule)(wrapped, n_microbatches=world(), loss_fn=loss_of)
    losses: list[Tensor] = []
    given = {"target": ids(), "losses": losses} if rank() == world() - 1 else {}
    with counting():
        run.step(*([ids()] if rank() == 0 else []), **given)
    loss = torch.stack(losses).mean() if losses else torch.zeros((), device=npu())
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: whole(p.grad) for p in stage.parameters() if p.grad is not None}
    everyones: list[Step] = [{}] * world()
    dist.all_gather_object(everyones, found)
    merged = {name: gradient for each in everyones for name, gradient in each.items()}
    return {"loss": mean_over_ranks(loss) * world(), **merged}


def pipeline_gpipe(case: Case) -> Step:
    return pipeline(case, "ScheduleGPipe")


def pipeline_1f1b(case: Case) -> Step:
    return pipeline(case, "Schedule1F1B")


DENSE = ("qwen3",)
ENGINES = (
    Engine("DDP", ddp, adapters=True),
    Engine("DDP, static graph", ddp_static_graph, adapters=True),
    Engine("DDP, no_sync", ddp_no_sync, adapters=True),
    Engine("DDP, fp16 hook", ddp_fp16_hook, adapters=True, rounds=True),
    Engine("FSDP2", fsdp2, adapters=True),
    Engine("FSDP2, two forwards before two backwards", fsdp2_two_forwards, adapters=True),
    Engine("FSDP2, checkpoint_wrapper", fsdp2_checkpointed, adapters=True),
    Engine("FSDP2, gradient checkpointing", fsdp2_gradient_checkpointing, adapters=True),
    Engine("FSDP2, CPU offload", fsdp2_cpu_offload, adapters=True),
    Engine("FSDP2, bfloat16 policy", fsdp2_bfloat16, adapters=True, rounds=True),
    Engine("HSDP", hsdp),
    Engine("FSDP1", fsdp1, adapters=True),
    Engine("FSDP1, flat parameters", fsdp1_flat),
    Engine("checkpoint of a patched model", checkpoint_of_patched, adapters=True),
    Engine("checkpoint of an unpatched model", checkpoint_of_unpatched, adapters=True),
    Engine("norms on shards of the sequence", sequence_parallel_norms, DENSE),
    Engine("pipeline, GPipe", pipeline_gpipe),
    Engine("pipeline, 1F1B", pipeline_1f1b),
)
