"""What a decoded token costs, by what is switched on, counted on the simulated NPU: no times.

    python -m npu_patch.simulator scripts/bench_decode.py
    python -m npu_patch.simulator scripts/bench_decode.py qwen3_next --cache static --batch 2 --by-operator
    python -m npu_patch.simulator scripts/bench_decode.py qwen3 --dtype float32 --check

Host launches and device kernels for unpatched, each of the switches in WAYS, and all of them; per layer too, as the
difference of a model of `--layers` and one of half as many: whatever is done once a token falls out. `--check` compares
the greedy tokens of the ways on a small random model and, where they differ, says how far apart the two tokens' logits
are there, and which of them the model in float64 gives.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from npu_patch import simulator

if not simulator.is_active():
    simulator.start()

import torch
from torch import Tensor

import npu_patch
from npu_patch.commands.subject.tiny_model import random_model, shaken, tiny_config
from npu_patch.simulator.counters import Counted

UNPATCHED = "unpatched"
WAYS: dict[str, dict[str, Any]] = {  # a switch that is not named has its default
    UNPATCHED: {"patch": False},
    "inference off": {"triton": False, "inference": False},
    "patched": {"triton": False},
    "recurrent_bf16": {"triton": False, "recurrent_bf16": True},
    "triton": {"triton": True},
    "all": {"triton": True, "recurrent_bf16": True},
}
PROMPT = 12


@dataclass(frozen=True)
class Cost:
    """Of one token."""

    launches: float
    kernels: float
    host_copies: float
    by_op: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", nargs="*", default=["qwen3"], help="model types; qwen3 if none is given")
    parser.add_argument("--layers", type=int, default=8, help="an even multiple of the family's pattern (8)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    parser.add_argument("--cache", choices=("dynamic", "static"), default="static")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4, help="over which is averaged, or which --check compares")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--by-operator", action="store_true", help="each operator's kernels, per layer")
    parser.add_argument("--check", action="store_true", help="compare greedy tokens instead")
    options = parser.parse_args()
    for family in options.family:
        (check if options.check else compare)(family, options)


def compare(family: str, options: argparse.Namespace) -> None:
    print(f"{family}, {options.dtype}, batch {options.batch}, {options.cache} cache, {options.layers} layers")
    print(f"{'':<24}{'launches':>10}{'kernels':>10}{'waits':>8}{'per layer':>11}{'of unpatched':>14}")
    first: float | None = None
    for way in options.ways:
        cost, half = (counted(family, layers, WAYS[way], options) for layers in (options.layers, options.layers // 2))
        added = options.layers - options.layers // 2
        layer = (cost.kernels - half.kernels) / added
        first = layer if first is None else first
        row = f"{cost.launches:>10.0f}{cost.kernels:>10.0f}{cost.host_copies:>8.0f}{layer:>11.1f}{layer / first:>14.3f}"
        print(f"{way:<24}{row}", flush=True)
        if options.by_operator:
            names = sorted(cost.by_op, key=lambda name: -cost.by_op[name])
            of_layer = {name: (cost.by_op[name] - half.by_op.get(name, 0)) / added for name in names}
            print("\n".join(f"    {of_layer[name]:>6.2f} {cost.by_op[name]:>6.0f} {name}" for name in names))


def counted(family: str, layers: int, switches: dict[str, Any], options: argparse.Namespace) -> Cost:
    model = made(family, layers, getattr(torch, options.dtype))
    with npu_patch.applied(model, **switches), torch.no_grad():
        prompt = prompt_of(model, options.batch)
        cache = cache_for(model, options.cache, PROMPT + options.tokens + 2)
        step = stepping(model, prompt, cache)
        next(step)
        next(step)  # whatever is made once
        count = Counted()
        with simulator.count(count):
            for _ in range(options.tokens):
                next(step)
    tokens = options.tokens
    both = {name: made for each in (count.by_op, count.replayed_by_op) for name, (made, _) in each.items()}
    by_op = {name: number / tokens for name, number in both.items()}
    return Cost(count.launches / tokens, count.kernels / tokens, count.host_copies / tokens, by_op)


def check(family: str, options: argparse.Namespace) -> None:
    """Greedy tokens of each way against the first's. Where they part, both have seen the same tokens."""
    model = made(family, options.layers, getattr(torch, options.dtype))
    exact = made(family, options.layers, torch.float64, "cpu")
    exact.set_experts_implementation("eager")  # torch has no grouped product of float64
    exact.load_state_dict({name: tensor.double().cpu() for name, tensor in model.state_dict().items()})
    first: list[Tensor] | None = None
    print(f"{family}, {options.dtype}, batch {options.batch}, {options.cache} cache: {options.tokens} greedy tokens")
    for way in options.ways:
        with npu_patch.applied(model, **WAYS[way]), torch.no_grad():
            prompt = prompt_of(model, options.batch)
            step = stepping(model, prompt, cache_for(model, options.cache, PROMPT + options.tokens + 2))
            found = [next(step).double().cpu() for _ in range(options.tokens)]
        first = found if first is None else first
        print(f"{way:<24}{told(exact, prompt.cpu(), first, found)}", flush=True)


@torch.no_grad()
def told(exact: torch.nn.Module, prompt: Tensor, first: list[Tensor], found: list[Tensor]) -> str:
    """Of logits `[B, V]` for each token, whether their likeliest tokens are the same, sample by sample."""
    chosen = [torch.stack([logits.argmax(-1) for logits in each], 1) for each in (first, found)]
    apart = (chosen[0] != chosen[1]).nonzero().tolist()
    parted = {sample: at for sample, at in reversed(apart)}
    if not parted:
        return "equal"
    said = []
    for sample, at in sorted(parted.items()):
        seen = torch.cat((prompt[sample], chosen[0][sample, :at]))
        logits = exact(input_ids=seen[None], use_cache=False).logits[0, -1]
        theirs, ours = (tokens[sample, at] for tokens in chosen)
        gap = float(first[at][sample, theirs] - first[at][sample, ours])
        favoured = float(logits[theirs] - logits[ours])
        whom = "the first way's" if favoured > 0 else "this way's"
        said.append(f"sample {sample} from token {at}: {gap:.2g} apart there, float64 {abs(favoured):.2g} for {whom}")
    return "; ".join(said)


def stepping(model: torch.nn.Module, prompt: Tensor, cache: Any) -> Iterator[Tensor]:
    """Logits `[B, V]` after the prompt and after each likeliest token."""
    tokens = prompt
    while True:
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        logits = output.logits[:, -1]
        tokens = logits.argmax(-1, keepdim=True)
        yield logits


def made(family: str, layers: int, dtype: torch.dtype, device: str = "npu") -> torch.nn.Module:
    config = tiny_config(family)
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = layers
    if kinds and not isinstance(getattr(type(config), "layer_types", None), property):
        config.layer_types = [kinds[at % len(kinds)] for at in range(layers)]
    config.max_position_embeddings = 1024
    with torch.random.fork_rng(devices=[]):
        model = random_model(config, 0).float()
        torch.manual_seed(1)
        shaken(model)
    return model.to(device, dtype).eval()


def prompt_of(model: torch.nn.Module, batch: int) -> Tensor:
    ids = torch.arange(batch * PROMPT).view(batch, PROMPT) * 7 % (model.config.get_text_config().vocab_size - 3) + 3
    return ids.to(model.device)


def cache_for(model: torch.nn.Module, kind: str, length: int) -> Any:
    from transformers import DynamicCache, StaticCache

    if kind == "static":
        return StaticCache(config=model.config.get_text_config(), max_cache_len=length)
    return DynamicCache(config=model.config.get_text_config())


if __name__ == "__main__":
    main()
