"""What a doctor looks at: everything found on the machine, nothing yet judged."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from npu_patch.autoload.entry import AUTOLOAD, GROUP
from npu_patch.commands.console.output_file import why_no_file_can_be_made
from npu_patch.commands.console.terminal import Steps
from npu_patch.commands.doctor.cann import Cann, find_cann
from npu_patch.commands.doctor.processes import Answer, Processes, too_long
from npu_patch.commands.tuning_file import content_of
from npu_patch.switches import PREFIX, TUNE

TIMES = PREFIX + "TRITON_CACHE"
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
# Operators of torch_npu, and what calls them, or would.
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
    "npu_chunk_gated_delta_rule": "gated delta nets: declined",
    "npu_recurrent_gated_delta_rule": "gated delta nets: declined",
    "npu_fused_causal_conv1d": "gated delta nets: declined",
    "npu_cross_entropy_loss": "cross_entropy",
}


@dataclass(frozen=True)
class Findings:
    python: str
    distributions: tuple[tuple[str, str, str], ...]  # name, version, folder
    imports: Mapping[str, Answer]  # by module: `import torch` as anybody writes it
    torch_npu: Answer
    providers: Answer
    cann: Cann
    simulated: bool
    environ: Mapping[str, str] = field(repr=False)
    alone: Mapping[str, Answer] = field(default_factory=dict)  # of those that fail: without torch loading torch_npu
    tuning_file: Answer = field(default_factory=Answer)  # of TWINKLE_NPU_TUNE
    times_file: Answer = field(default_factory=Answer)  # of TWINKLE_NPU_TRITON_CACHE
    entries: Answer = field(default_factory=Answer)  # names of what torch calls when it is imported

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
    progress: Steps,
) -> Findings:
    """Probes the interpreter `python` in the environment `environ`; each probe has `timeout` seconds."""
    running = Processes()
    listed = running.ask(python, environ, timeout, "distributions")
    distributions = tuple((name, version, folder) for name, version, folder in listed.found or ())
    installed = [name for name in PACKAGES if any(same(name, each[0]) for each in distributions)]
    modules = list(dict.fromkeys(PACKAGES[name] for name in installed))
    progress.of(4 + len(modules))
    progress.done()

    def ask(*arguments: str) -> Answer:
        answer = running.ask(python, environ, timeout, *arguments)
        progress.done()
        return answer

    mode = "simulated" if simulated else "as it is"
    pool = ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 1))
    try:
        device = pool.submit(ask, "torch_npu", mode, *OPERATORS)
        providers = pool.submit(ask, "providers", mode)
        entries = pool.submit(ask, "entry_points", GROUP)
        imports = {name: pool.submit(ask, "package", mode, name) for name in modules}
        answers = {name: future.result() for name, future in imports.items()}
        failed = [name for name, answer in answers.items() if answer.error not in (None, too_long(timeout))]
        if simulated or environ.get(AUTOLOAD) == "0":
            failed = []
        again = {name: pool.submit(running.ask, python, environ, timeout, "package", "alone", name) for name in failed}
        return Findings(
            python,
            distributions,
            answers,
            device.result(),
            providers.result(),
            find_cann(environ),
            simulated,
            dict(environ),
            {name: future.result() for name, future in again.items()},
            _tuning_file(environ),
            _times_file(environ),
            entries.result(),
        )
    except BaseException:  # Ctrl-C: nobody waits for an answer any more
        pool.shutdown(wait=False, cancel_futures=True)
        running.kill()
        raise
    finally:
        pool.shutdown(wait=False)


def _tuning_file(environ: Mapping[str, str]) -> Answer:
    if not environ.get(TUNE):
        return Answer()
    try:
        return Answer(found=content_of(environ[TUNE]))
    except ValueError as error:
        return Answer(error=str(error))


def _times_file(environ: Mapping[str, str]) -> Answer:
    path = environ.get(TIMES)
    reason = why_no_file_can_be_made(Path(path)) if path else None
    return Answer(error=f"{TIMES}={path!r}: {reason}" if reason else None)
