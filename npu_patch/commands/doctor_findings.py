"""What a doctor looks at: everything found on the machine, nothing yet judged."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npu_patch.commands.cann import Cann, find_cann

PROBE = Path(__file__).with_name("doctor_probe.py")
ROOT = Path(__file__).parents[2]
# By the name under which pip knows each; what is imported to see whether it works.
PACKAGES: Mapping[str, str] = {
    "torch": "torch",
    "torch_npu": "torch_npu",
    "triton": "triton",
    "triton-ascend": "triton",
    "transformers": "transformers",
    "peft": "peft",
    "accelerate": "accelerate",
    "kernels": "kernels",
    "mindspeed": "mindspeed",
    "flash-linear-attention": "fla",
    "fla-core": "fla",
    "numpy": "numpy",
}
# Operators of torch_npu, and what calls them.
OPERATORS: Mapping[str, str] = {
    "npu_rms_norm": "rms_norm",
    "npu_rotary_mul": "rope",
    "npu_swiglu": "swiglu, experts",
    "npu_fusion_attention": "attention",
    "npu_fusion_attention_v2": "attention with sinks",
    "npu_fused_infer_attention_score": "attention of single tokens",
    "npu_moe_token_permute": "experts",
    "npu_grouped_matmul": "experts",
    "npu_moe_token_unpermute": "experts",
}


@dataclass(frozen=True)
class Answer:
    """Of one probe: what it found, or why not."""

    found: Any = None
    error: str | None = None


@dataclass(frozen=True)
class Findings:
    python: str
    distributions: tuple[tuple[str, str, str], ...]  # name, version, folder
    imports: Mapping[str, Answer]  # by module
    torch_npu: Answer
    providers: Answer
    cann: Cann
    simulated: bool
    environ: Mapping[str, str] = field(repr=False)

    def version(self, name: str) -> str | None:
        """Of an installed distribution; the first on the path counts."""
        return next((version for each, version, _ in self.distributions if same(each, name)), None)

    def release(self, name: str) -> tuple[int, ...] | None:
        """(2, 13, 0) of 2.13.0.post1+cpu."""
        return release(self.version(name))


def same(one: str, other: str) -> bool:
    """Whether pip takes two names for one."""
    return re.sub(r"[-_.]+", "-", one).lower() == re.sub(r"[-_.]+", "-", other).lower()


def release(version: str | None) -> tuple[int, ...] | None:
    numbers = re.match(r"\d+(\.\d+)*", version or "")
    return tuple(int(number) for number in numbers.group().split(".")) if numbers else None


def look(
    python: str,
    environ: Mapping[str, str],
    *,
    timeout: float,
    simulated: bool = False,
    root: Path = Path("/"),
    done: Callable[[], None] = lambda: None,
) -> Findings:
    """Probes the interpreter `python` in the environment `environ`; each probe has `timeout` seconds. `done()` is
    called `NUMBER_OF_PROBES` times."""

    def ask(*arguments: str) -> Answer:
        answer = _ask(python, environ, timeout, arguments)
        done()
        return answer

    listed = ask("distributions")
    distributions = tuple((name, version, folder) for name, version, folder in listed.found or ())
    installed = {module for name, module in PACKAGES.items() if any(same(name, each[0]) for each in distributions)}
    mode = "simulated" if simulated else "as it is"
    with ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 1)) as pool:
        device = pool.submit(ask, "torch_npu", mode, *OPERATORS)
        providers = pool.submit(ask, "providers", mode)
        modules = list(dict.fromkeys(PACKAGES.values()))
        imports = {name: pool.submit(ask, "package", name) for name in modules if name in installed}
        answers = {name: future.result() for name, future in imports.items()}
        return Findings(
            python,
            distributions,
            answers,
            device.result(),
            providers.result(),
            find_cann(environ, root),
            simulated,
            dict(environ),
        )


NUMBER_OF_PROBES = 3 + len(set(PACKAGES.values()))


def _ask(python: str, environ: Mapping[str, str], timeout: float, arguments: tuple[str, ...]) -> Answer:
    path = os.pathsep.join(each for each in (environ.get("PYTHONPATH", ""), str(ROOT)) if each)
    command = [python, "-W", "ignore", str(PROBE), *arguments]
    try:
        done = subprocess.run(
            command,
            env={**environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return Answer(error=f"no answer within {timeout:g} s")
    except OSError as error:
        return Answer(error=f"{python} cannot be run: {error}")
    try:
        return Answer(**json.loads((done.stdout.strip().splitlines() or [""])[-1]))
    except (ValueError, TypeError):
        return Answer(error=_death(done))


def _death(done: subprocess.CompletedProcess[str]) -> str:
    last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
    how = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return f"the process died ({how}): {last}"


def this_python() -> str:
    return sys.executable
