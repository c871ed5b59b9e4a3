"""One of two CPU ranks over gloo: trains a tiny model under a wrapper, saves it and loads it, unpatched, patched before
wrapping and patched after it, and writes down what each computed.

python tests/support/ranks.py WRAPPER DIRECTORY  # with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; see torchrun
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[0] = str(Path(__file__).parents[2])
from npu_patch import simulator

if simulator.real_device() is None:
    simulator.start()  # torch_npu does not import without; the ranks use the CPU

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import npu_patch
from tests.support.tiny_models import tiny, tiny_batch

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
STEPS = 3


def ddp(model: torch.nn.Module) -> torch.nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: torch.nn.Module) -> torch.nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, mesh=MESH)
    return fully_shard(model, mesh=MESH)


def accelerate(model: torch.nn.Module) -> torch.nn.Module:
    """accelerate's own wrapping by class names. Its front door takes FSDP for accelerators only, so the function behind
    it is called, with what it looks at."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen3DecoderLayer"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=MESH,
        parallelism_config=SimpleNamespace(fsdp_dim_names=MESH.mesh_dim_names),
        device=torch.device("cpu"),
        is_main_process=dist.get_rank() == 0,
        mixed_precision="no",
    )
    return fsdp2_prepare_model(accelerator, model)


WRAPPERS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {"ddp": ddp, "fsdp": fsdp, "accelerate": accelerate}


def train(model: torch.nn.Module, rank: int) -> list[str]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(STEPS):
        loss = model(**tiny_batch(seed=10 * step + rank)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item().hex())
    return losses


def whole_state(model: torch.nn.Module) -> dict[str, Tensor]:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return get_model_state_dict(inner, options=FULL)


def trained(wrapper: str, patched: str, directory: Path) -> dict[str, Any]:
    rank = dist.get_rank()
    model = tiny("qwen3").train()
    report = npu_patch.apply(model, device="cpu", strict=True) if patched == "before" else None
    model = WRAPPERS[wrapper](model)
    if patched == "after":
        report = npu_patch.apply(model, device="cpu", strict=True)
    found: dict[str, Any] = {
        "classes": [type(module).__name__ for module in model.modules()],
        "names": [name for name, _ in model.named_parameters()],
        "placements": [str(p.placements) if isinstance(p, DTensor) else "whole" for p in model.parameters()],
        "losses": train(model, rank),
    }
    state = whole_state(model)
    if rank == 0:
        torch.save(state, directory / "state.pt")
    dist.barrier()
    twin = WRAPPERS[wrapper](tiny("qwen3", seed=5).train())
    inner = twin.module if isinstance(twin, DistributedDataParallel) else twin
    loaded = torch.load(directory / "state.pt")
    found["keys"] = list(loaded)
    weighted = {
        name: each.double() * torch.arange(1, each.numel() + 1).view(each.shape) for name, each in loaded.items()
    }
    found["checkpoint"] = {name: each.norm().item() for name, each in weighted.items()}
    set_model_state_dict(inner, loaded, options=FULL)
    with torch.no_grad():
        found["loss after loading"] = twin(**tiny_batch(seed=99)).loss.item().hex()
        found["loss before saving"] = model(**tiny_batch(seed=99)).loss.item().hex()
    if report is not None:
        found["ran"] = sorted({o.patch for o in report.patched if o.calls.ran})
        # The loss aside, which leaves a head that accelerate hooks to the original.
        others = [o for o in report if o.patch != "cross_entropy"]
        found["fell through"] = sorted({reason for o in others for reason in o.calls.fell_through})
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo")
    MESH = dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shards",))
    torch.set_num_threads(1)
    results = {}
    for when in ("never", "before", "after"):
        results[when] = trained(sys.argv[1], when, Path(sys.argv[2]))
        npu_patch.restore()
        dist.barrier()
    Path(sys.argv[2], f"{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()
