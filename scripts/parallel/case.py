"""One cell of the table: a model of a family, patched before its engine wraps it, after or never; and a step of it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import npu_patch
from npu_patch import simulator
from tests.support.tiny_models import tiny

Step = dict[str, Tensor]
"""The loss, as "loss", and the gradient of each parameter, or the "logits": of the whole batch, float64 on the CPU."""
Change = Callable[[nn.Module], None]
LENGTH = 16
ROWS = 2  # of each rank
WRAPPED = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module.")


@functools.cache
def rank() -> int:
    return dist.get_rank()


@functools.cache
def world() -> int:
    return dist.get_world_size()


def npu() -> torch.device:
    return torch.device("npu", torch.npu.current_device())


def ids() -> Tensor:
    """`[ROWS * world, LENGTH]`, the same on every rank: each row has as many labels."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, 101, (ROWS * world(), LENGTH), generator=generator).to(npu())


def mine() -> Tensor:
    return ids()[ROWS * rank() : ROWS * (rank() + 1)]


def sizes(family: str) -> dict[str, Any]:
    """What two and four ranks divide."""
    layers = max(2, world())
    found: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": layers}
    if "moe" in family:
        found["num_experts"] = 4
    if family == "qwen3_5":
        found["layer_types"] = ["linear_attention", "full_attention"] * (layers // 2)
        found["linear_num_key_heads"], found["linear_num_value_heads"] = 2, 8  # the former fewer than four ranks
    return found


def plain(family: str, lora: bool, seed: int = 0, change: Change | None = None) -> nn.Module:
    """On the CPU, the same on every rank."""
    model = tiny(family, seed=seed, **sizes(family))
    if change is not None:
        change(model)
    return (with_adapters(model, seed) if lora else model).train()


def with_adapters(model: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed + 1)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def without_wrappers(name: str) -> str:
    for each in WRAPPED:
        name = name.replace(each, "")
    return name


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().cpu().double()


def gradients(model: nn.Module) -> Step:
    """Of what is trained: FSDP1 has gradients of zeros for what is frozen."""
    trained = ((name, p.grad) for name, p in model.named_parameters() if p.requires_grad and p.grad is not None)
    return {without_wrappers(name): whole(gradient) for name, gradient in trained}


def mean_over_ranks(loss: Tensor) -> Tensor:
    loss = loss.full_tensor() if isinstance(loss, DTensor) else loss
    loss = loss.detach().float().clone().reshape(1)
    dist.all_reduce(loss, dist.ReduceOp.AVG)
    return loss.cpu().double()


def step(model: nn.Module, batch: Tensor) -> Step:
    """Of an engine that averages what each rank computed of its rows, or whose ranks all have the same rows."""
    with counting():
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
    return {"loss": mean_over_ranks(loss), **gradients(model)}


@torch.no_grad()
def evaluated(model: nn.Module, batch: Tensor) -> Step:
    with counting():
        logits = model.eval()(input_ids=batch, use_cache=False).logits
    return {"logits": whole(logits)}


COUNTS: dict[str, tuple[int, int]] = {}
"""Of the last step of an engine: each function of HCCL, with its calls and the bytes that this rank sent by it."""


@contextmanager
def counting() -> Iterator[None]:
    with simulator.count() as counted:
        yield
    COUNTS.clear()
    COUNTS.update(counted.collectives_by_call)


@dataclass(frozen=True)
class Engine:
    name: str
    run: Callable[[Case], Step]
    families: tuple[str, ...] = ("qwen3", "qwen3_moe", "qwen3_5")
    adapters: bool = False
    """Whether it is run with LoRA too."""
    rounds: bool = False
    """It computes or sends 16-bit numbers: a patched model may be as far off as an unpatched one."""
    in_one_row: bool = False
    """All tokens are one sequence, of which each rank has a part."""
    evaluates: bool = False
    """No gradients: logits are compared."""
    change: Change | None = None
    """What is different about the model."""


@dataclass
class Case:
    family: str
    lora: bool
    when: str  # "never", "before" or "after": apply() and the engine's wrapping
    change: Change | None = None
    report: npu_patch.Report | None = None

    def built(self, seed: int = 0) -> nn.Module:
        """On the NPU, patched if it is to be before."""
        return self.before(plain(self.family, self.lora, seed).to(npu()))

    def before(self, model: nn.Module) -> nn.Module:
        return self._patched(model, "before")

    def after(self, model: nn.Module) -> nn.Module:
        return self._patched(model, "after")

    def _patched(self, model: nn.Module, when: str) -> nn.Module:
        if self.when == when:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.report = npu_patch.apply(model)
        return model

    def ran(self) -> Iterator[str]:
        """The patches that served."""
        if self.report is not None:
            yield from sorted({outcome.patch for outcome in self.report.patched if outcome.calls.ran})

    def left(self) -> Iterator[str]:
        """What was left to the original, and why."""
        for outcome in self.report or ():
            if outcome.status == "failed" or (outcome.status == "skipped" and outcome.layers):
                yield f"{outcome.patch}: {outcome.status}: {outcome.reason}"
            yield from (f"{outcome.patch}: {reason}" for reason in outcome.calls.fell_through)
