"""Host time of LoRA layers: of q, k and v with one input, of one layer alone, and of a whole decoder layer.

    python scripts/lora_host.py                      # peft, torch, and around kernels that do nothing
    python scripts/lora_host.py --before CHECKOUT    # another checkout of the project as well, in turns with this one
    python scripts/lora_host.py --profile 25         # the functions in which a decoder layer spends its time

Microseconds of processor time on the CPU, forward + backward, of tiny tensors: bfloat16 layers, float32 adapters with a
dropout of 0.05. Of Triton kernels all that surrounds a launch is measured: the launcher finds one compiled that does
nothing. So their results are wrong on purpose, and no number here says how fast a kernel is.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import pstats
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WAYS: dict[str, dict[str, Any]] = {"peft": {"patch": False}, "torch": {"triton": False}, "triton": {"triton": True}}
BLOCKS, CALLS, TURNS = 3, 60, 2
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4, "vocab_size": 128}
FROZEN = "q, k, v without adapters"
Times = dict[str, tuple[float, float]]  # by the name of what is measured and the way: forward, backward


def main() -> None:
    options = arguments()
    if options.checkout is not None:
        sys.path.insert(0, str(options.checkout))
        print(json.dumps(measured(options)))
        return
    checkouts = [ROOT] if options.before is None else [options.before.resolve(), ROOT]
    turns: list[list[Times]] = [[] for _ in checkouts]
    for _ in range(1 if len(checkouts) == 1 or options.profile else TURNS):
        for taken, checkout in zip(turns, checkouts, strict=True):
            taken.append(in_a_process_of_its_own(checkout, options))
    if options.profile:
        return
    *former, now = [medians(taken) for taken in turns]
    for name, (forward, backward) in now.items():
        line = f"{name:<28}{forward:8.1f} + {backward:7.1f}"
        for before in former:
            ratios = f"{forward / before[name][0]:.2f}, {backward / before[name][1]:.2f}"
            line += f"   before {before[name][0]:8.1f} + {before[name][1]:7.1f}   = {ratios}"
        print(line)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="another checkout, an older one perhaps")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="name the N functions that take longest")
    parser.add_argument("--checkout", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def in_a_process_of_its_own(checkout: Path, options: argparse.Namespace) -> Times:
    command = [sys.executable, __file__, "--checkout", str(checkout), "--profile", str(options.profile)]
    ran = subprocess.run([*command, "--ways", *options.ways], stdout=subprocess.PIPE, text=True, check=True)
    *shown, last = ran.stdout.splitlines()
    print("\n".join(shown), end="\n" if shown else "")
    return json.loads(last)


def medians(turns: list[Times]) -> Times:
    return {
        name: tuple(statistics.median(turn[name][part] for turn in turns) for part in range(2)) for name in turns[0]
    }


def measured(options: argparse.Namespace) -> Times:
    warnings.filterwarnings("ignore")
    from npu_patch.commands.subject.families import without_broken_torch_npu

    without_broken_torch_npu()
    import torch

    import npu_patch

    torch.set_num_threads(1)
    launch_nothing()
    model = decoder()
    found: dict[str, list[tuple[float, float]]] = {}
    gc.disable()
    for _ in range(BLOCKS):
        for way in options.ways:
            with npu_patch.applied(model, device="cpu", **WAYS[way]):
                for name, form in forms(model).items():
                    if name == FROZEN and way != options.ways[0]:
                        continue
                    block(form, CALLS)  # what is looked up once
                    if options.profile and name == "decoder layer":
                        profiled(way, form, options.profile)
                    title = name if name == FROZEN else f"{name}, {way}"
                    found.setdefault(title, []).append(block(form, CALLS))
            gc.collect()
        if options.profile:
            break
    return medians([dict(zip(found, each, strict=True)) for each in zip(*found.values(), strict=True)])


def launch_nothing() -> None:
    """The Triton kernels serve the CPU, as ones that were compiled and do nothing."""
    from npu_patch.kernels import launch
    from npu_patch.patches import CATALOGUE

    class Nothing:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments: None

    class Compiled(dict[Any, Any]):
        def get(self, key: Any, default: Any = None) -> Any:
            hash(key)
            return super().get(key) or self.setdefault(key, launch._Compiled(Nothing(), ()))

    launch._COMPILED = Compiled()
    for patch in CATALOGUE:
        for op in (patch.op, *patch.further_ops):
            for each in op.implementations:
                if each.optional:
                    object.__setattr__(each, "device_types", (*each.device_types, "cpu"))
                    object.__setattr__(each, "missing", lambda: None)


def decoder() -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**SIZES, num_key_value_heads=2, num_hidden_layers=1)
    model = Qwen3ForCausalLM(config).bfloat16()
    model = get_peft_model(model, LoraConfig(r=8, lora_dropout=0.05, target_modules="all-linear"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    assert next(each for each in model.parameters() if each.requires_grad).dtype == torch.float32
    return model.train()


def forms(model: Any) -> dict[str, Callable[[], Any]]:
    import torch

    layer = model.base_model.model.model.layers[0]
    attention = layer.self_attn
    x = torch.randn(1, 8, SIZES["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
    rotation = model.base_model.model.model.rotary_emb(x, torch.arange(8)[None])

    class Projections(type(attention)):
        """Called one after the other, as the attention does."""

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]

    projections = Projections(model.config, 0)
    projections._modules.update({name: attention._modules[name] for name in ("q_proj", "k_proj", "v_proj")})

    def together() -> list[torch.Tensor]:
        return projections(x)

    def alone() -> torch.Tensor:
        return attention.o_proj(x)

    def whole() -> torch.Tensor:
        return layer(x, position_embeddings=rotation)

    def frozen() -> list[torch.Tensor]:
        return [each.base_layer(x) for each in (attention.q_proj, attention.k_proj, attention.v_proj)]

    return {"q, k, v": together, "o": alone, "decoder layer": whole, FROZEN: frozen}


def block(form: Callable[[], Any], calls: int) -> tuple[float, float]:
    """Microseconds of one forward and of one backward."""
    import torch
    from torch.utils._pytree import tree_leaves

    started = time.process_time()
    results = [form() for _ in range(calls)]
    forward = time.process_time() - started
    outputs = [[each + 0 if type(each) is not torch.Tensor else each for each in tree_leaves(one)] for one in results]
    seeds = [torch.ones_like(each) for each in outputs[0]]
    started = time.process_time()
    for each in outputs:
        torch.autograd.backward(each, seeds)
    backward = time.process_time() - started
    return forward / calls * 1e6, backward / calls * 1e6


def profiled(way: str, form: Callable[[], Any], most: int) -> None:
    profile = cProfile.Profile()
    profile.runcall(block, form, 10 * CALLS)
    for line in longest(profile, most):
        print(f"{way:<8}{line}")


def longest(profile: cProfile.Profile, most: int) -> Iterator[str]:
    """Microseconds of one step in each function by itself, and in all that it calls."""
    stats: Any = pstats.Stats(profile).stats
    steps = 10 * CALLS / 1e6
    for (file, line, name), (_, calls, own, total, _) in sorted(stats.items(), key=lambda each: -each[1][2])[:most]:
        place = "" if file == "~" else f" {'/'.join(Path(file).parts[-2:])}:{line}"
        print_calls = calls / 10 / CALLS
        yield f"{own / steps:8.1f} own {total / steps:8.1f} in all {print_calls:6.1f} calls  {name}{place}"


if __name__ == "__main__":
    main()
