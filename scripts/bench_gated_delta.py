"""Times the gated delta rule: transformers' torch path, ours in several tilings, and fla where it is installed.

    python scripts/bench_gated_delta.py                      # CUDA if there is one, else the CPU
    python scripts/bench_gated_delta.py --tokens 512 --key-heads 4 --heads 4
    python scripts/bench_gated_delta.py --tilings 64:1 64:4 128:2 --only ours
    python scripts/bench_gated_delta.py --count              # kernel launches and bytes on the simulated NPU instead
    python scripts/bench_gated_delta.py --profile 64:4       # the kernels of one forward and backward, by time

A tiling is CHUNK:GROUP, tokens in a chunk and chunks in a group of the scan ("auto" for the default group). Variants
are timed in turns within each repeat; medians are printed. Errors are relative (norm of the difference over the norm),
against a float64 recurrence, token by token. Memory is the peak beyond the arguments. --profile also says how much of
a forward and of a step is matrix products in float32.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from npu_patch import simulator

if simulator.real_device() is None and importlib.util.find_spec("torch_npu") is not None:
    simulator.start()  # for --count; and with torch_npu but no CANN, transformers cannot be imported without it

import torch
from torch import Tensor

from npu_patch.ops.gated_delta import rule as ours
from npu_patch.ops.gated_delta.calls import RuleCall
from npu_patch.ops.gated_delta.causal_conv1d import causal_conv1d

NAMES = ("o", "dq", "dk", "dv", "dg", "dbeta")
TRANSFORMERS = "transformers"
GOALS = {"forward": 3.0, "forward + backward": 5.0}  # times faster than transformers, at the default sizes on a GPU


@dataclass(frozen=True)
class Arguments:
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    do: Tensor

    def leaves(self) -> list[Tensor]:
        return [x.detach().requires_grad_() for x in (self.q, self.k, self.v, self.g, self.beta)]


Rule = Callable[..., tuple[Tensor, "Tensor | None"]]


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("npu" if options.count else "cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision(options.precision)
    dtype = getattr(torch, options.dtype)
    made = make(options, device, dtype)
    print(
        f"torch {torch.__version__}, {torch.cuda.get_device_name() if device.type == 'cuda' else device.type}; "
        f"B={options.batch} T={options.tokens} Hk={options.key_heads} Hv={options.heads} D={options.dim} "
        f"{options.dtype}, float32 products: {options.precision}\n"
    )
    rules = variants(options)
    if options.count:
        count(rules, made, options.forward_only)
        return
    if options.profile:
        profile(tiled(options.profile), made, device)
        return
    usable = {}
    for name, rule in rules.items():
        try:
            step(rule, made)
            usable[name] = rule
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            try:
                rule(*inputs(made))
                usable[name] = forward_only(rule)
            except Exception as error:
                print(f"{name}, forward only: {type(error).__name__}: {str(error)[:300]}")
    forward = timed({n: (lambda r=r: no_grad(r, made)) for n, r in usable.items()}, options, device)
    both = {} if options.forward_only else {n: r for n, r in usable.items() if not hasattr(r, "forward_only")}
    full = timed({n: (lambda r=r: step(r, made)) for n, r in both.items()}, options, device)
    table("forward", forward, {n: memory(lambda r=r: no_grad(r, made), device) for n, r in usable.items()})
    if full:
        table("forward + backward", full, {n: memory(lambda r=r: step(r, made), device) for n, r in both.items()})
    if options.check:
        errors(usable, made, options.check)
    if not options.no_conv:
        conv(options, device, dtype)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32, help="value heads")
    parser.add_argument("--key-heads", type=int, default=None, help="default: as many as value heads")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tilings", nargs="+", default=["64:auto", "64:1", "64:4", "128:1", "128:2"])
    parser.add_argument("--precision", default="highest", choices=("highest", "high"), help="high: TF32, for everyone")
    parser.add_argument("--only", nargs="+", default=None, help="prefixes of the variants to run")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--check", type=int, default=1024, help="tokens of the error check; 0 for none")
    parser.add_argument("--decay", type=float, default=1.0, help="g is -DECAY softplus(normal)")
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--no-conv", action="store_true", help="leave out the causal convolution")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--profile", default=None, metavar="TILING")
    options = parser.parse_args()
    options.key_heads = options.key_heads or options.heads
    return options


def make(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Arguments:
    shape = (options.batch, options.tokens)
    on = {"device": "cpu"}
    q, k = (torch.randn(*shape, options.key_heads, options.dim, **on) for _ in range(2))
    v, do = (torch.randn(*shape, options.heads, options.dim, **on) for _ in range(2))
    g = -options.decay * torch.nn.functional.softplus(torch.randn(*shape, options.heads, **on))
    beta = torch.rand(*shape, options.heads, **on)
    made = Arguments(q.to(dtype), k.to(dtype), v.to(dtype), g, beta.to(dtype), do.to(dtype))
    return Arguments(*(x.to(device) for x in vars(made).values()))


def tiled(text: str) -> Rule:
    chunk, group = text.split(":")
    tiling = ours.Tiling(int(chunk), None if group == "auto" else int(group))

    def rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor | None]:
        return ours.chunk_gated_delta_rule(RuleCall(q, k, v, g, beta, normalize=True), tiling)

    return rule


def variants(options: argparse.Namespace) -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    group = options.heads // options.key_heads

    def repeated(rule: Rule) -> Rule:
        """Heads repeated as modeling files do that do not leave it to the rule."""
        return lambda q, k, *rest, **given: rule(
            *((x.repeat_interleave(group, 2) if group > 1 else x) for x in (q, k)), *rest, **given
        )

    try:
        import transformers.models.qwen3_next.modeling_qwen3_next as modeling

        function = modeling.torch_chunk_gated_delta_rule
        # Beside an installed fla the module's global is fla's; the torch function is what it wraps.
        function = getattr(function, "__wrapped__", function)
        rules[TRANSFORMERS] = repeated(
            lambda q, k, v, g, beta: function(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)
        )
    except ImportError as error:
        print(f"{TRANSFORMERS}: {error}")
    for text in options.tilings:
        rules[f"ours {text}"] = tiled(text)
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as fla_rule

        rules["fla"] = lambda q, k, v, g, beta: fla_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)
    except Exception as error:
        print(f"fla: {type(error).__name__}: {error}")
    if options.only:
        rules = {name: rule for name, rule in rules.items() if name.startswith(tuple(options.only))}
    return rules


def inputs(made: Arguments) -> tuple[Tensor, ...]:
    return made.q, made.k, made.v, made.g, made.beta


@torch.no_grad()
def no_grad(rule: Rule, made: Arguments) -> Tensor:
    return rule(*inputs(made))[0]


def step(rule: Rule, made: Arguments) -> tuple[Tensor, ...]:
    """The output and the gradients."""
    leaves = made.leaves()
    o = rule(*leaves)[0]
    return o.detach(), *torch.autograd.grad(o, leaves, made.do)


def forward_only(rule: Rule) -> Rule:
    def only(*args: Tensor) -> tuple[Tensor, Tensor | None]:
        return rule(*args)

    only.forward_only = True
    return only


def timed(
    functions: dict[str, Callable[[], object]], options: argparse.Namespace, device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds of each repeat, the functions taking turns.

    Each turn begins with an untimed call, and garbage is collected before it and not within: what the one before left
    behind (caches, the allocator's blocks, reference cycles) is not on this one's account."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    try:
        for repeat in range(options.warm_up + options.repeats):
            for name, function in functions.items():
                gc.collect()
                gc.disable()
                function()
                elapsed = once(function, device)
                if repeat >= options.warm_up:
                    times[name].append(elapsed)
    finally:
        gc.enable()
    return times


def once(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    began = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - began)


def memory(function: Callable[[], object], device: torch.device) -> float | None:
    """Peak GiB beyond what was allocated before; None where it is not known."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = function()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def table(title: str, times: dict[str, list[float]], peaks: dict[str, float | None]) -> None:
    """With the goal, which is for the tiling that the package chooses: the first of ours."""
    print(f"{title:<24}{'median ms':>11}{'min':>9}{'max':>9}{'times faster':>14}{'peak GiB':>10}")
    reference = next((statistics.median(times[name]) for name in times if name == TRANSFORMERS), None)
    for name, taken in times.items():
        median = statistics.median(taken)
        ratio = f"{reference / median:.2f}" if reference else "-"
        peak = "-" if peaks.get(name) is None else f"{peaks[name]:.3f}"
        print(f"{name:<24}{median:>11.3f}{min(taken):>9.3f}{max(taken):>9.3f}{ratio:>14}{peak:>10}")
    default = next((statistics.median(taken) for name, taken in times.items() if name.startswith("ours")), None)
    if title in GOALS and reference and default:
        word = "reached" if reference >= GOALS[title] * default else "NOT reached"
        print(f"goal: {GOALS[title]} times faster than transformers: {word}")
    print()


def errors(rules: dict[str, Rule], made: Arguments, tokens: int) -> None:
    """Of the first tokens, in the dtype of the arguments and in float32."""
    few = Arguments(*(x[:, :tokens].contiguous() for x in vars(made).values()))
    exact = step(recurrence, Arguments(*(x.double() for x in vars(few).values())))
    for dtype in (few.q.dtype, torch.float32):
        if dtype == torch.float32:
            few = Arguments(*(x.float() for x in vars(few).values()))
        print(f"{f'error, {dtype}'.replace('torch.', ''):<24}" + "".join(f"{name:>11}" for name in NAMES))
        for name, rule in rules.items():
            try:
                found = (no_grad(rule, few),) if hasattr(rule, "forward_only") else step(rule, few)
            except Exception as error:
                print(f"{name:<24}{type(error).__name__}: {str(error)[:200]}")
                continue
            pairs = zip(found, exact, strict=False)  # the output alone of a variant without a backward
            print(f"{name:<24}" + "".join(f"{float((a.double() - b).norm() / b.norm()):>11.2e}" for a, b in pairs))
        print()


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token."""
    group = v.shape[2] // k.shape[2]
    q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(group, 2) for x in (q * q.shape[-1] ** -0.5, k))
    state = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1])
    out = []
    for q_t, k_t, v_t, g_t, beta_t in zip(*(x.unbind(1) for x in (q, k, v, g, beta)), strict=True):
        state = state * g_t.exp()[..., None, None]
        written = beta_t[..., None] * (v_t - (k_t[..., None, :] @ state).squeeze(-2))
        state = state + k_t[..., None] * written[..., None, :]
        out.append((q_t[..., None, :] @ state).squeeze(-2))
    return torch.stack(out, 1), state


def conv(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """The causal convolution over q, k and v of the same layer: ours, and as transformers writes it."""
    channels, width = options.dim * (2 * options.key_heads + options.heads), 4
    held = torch.randn(options.batch, options.tokens, channels, device=device, dtype=dtype)
    weight = torch.randn(channels, width, device=device, dtype=dtype) / width**0.5
    bounds = torch.arange(0, options.tokens + 1, max(1, options.tokens // 8), device=device)

    def plain(x: Tensor, w: Tensor) -> Tensor:
        y = torch.nn.functional.conv1d(x, w[:, None], padding=width - 1, groups=channels)[..., : x.shape[-1]]
        return torch.nn.functional.silu(y)

    ways = {
        TRANSFORMERS: plain,
        "ours": lambda x, w: causal_conv1d(x, w, activation="silu"),
        "ours, packed": lambda x, w: causal_conv1d(x, w, activation="silu", cu_seqlens=bounds),
    }

    def both(way: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = held.detach().requires_grad_(), weight.detach().requires_grad_()
        y = way(leaves[0].transpose(1, 2), leaves[1]).transpose(1, 2)
        return torch.autograd.grad(y.contiguous(), leaves, held)

    def alone(way: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return way(held.transpose(1, 2), weight).transpose(1, 2).contiguous()

    forward = {name: (lambda w=w: alone(w)) for name, w in ways.items()}
    full = {name: (lambda w=w: both(w)) for name, w in ways.items()}
    with torch.no_grad():
        times = timed(forward, options, device)
    table("conv1d forward", times, {n: memory(f, device) for n, f in forward.items()})
    table("conv1d forward+backward", timed(full, options, device), {n: memory(f, device) for n, f in full.items()})


def count(rules: dict[str, Rule], made: Arguments, forward: bool) -> None:
    print(f"{'on the simulated NPU':<24}{'forward':>9}{'MB':>9}{'forward + backward':>20}{'MB':>9}{'host copies':>13}")
    for name, rule in rules.items():
        with simulator.count() as one:
            no_grad(rule, made)
        leaves = made.leaves()
        cells = f"{name:<24}{one.launches:>9}{one.bytes / 1e6:>9.0f}"
        if not forward:
            with simulator.count() as two:
                torch.autograd.grad(rule(*leaves)[0], leaves, made.do)
            cells += f"{two.launches:>20}{two.bytes / 1e6:>9.0f}{two.host_copies:>13}"
        print(cells, flush=True)


def profile(rule: Rule, made: Arguments, device: torch.device) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    for title, run in (("forward", lambda: no_grad(rule, made)), ("forward + backward", lambda: step(rule, made))):
        for _ in range(3):
            run()
        with profiled(activities=activities) as seen:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
        order = "cuda_time_total" if device.type == "cuda" else "cpu_time_total"
        print(f"{title}: {products(seen)}")
        print(seen.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90))


def products(seen: torch.profiler.profile) -> str:
    """How much of the time of all kernels is that of batched matrix products."""
    ops = [event for event in seen.key_averages() if event.key.startswith("aten::")]
    milliseconds = {event.key: (event.self_device_time_total or event.self_cpu_time_total) / 1e3 for event in ops}
    of_products = sum(milliseconds[name] for name in ("aten::bmm", "aten::baddbmm", "aten::baddbmm_"))
    return f"{of_products:.2f} of {sum(milliseconds.values()):.2f} ms of kernels are matrix products"


if __name__ == "__main__":
    main()
