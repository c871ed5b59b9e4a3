"""What a doctor looks at: everything found on the machine, nothing yet judged."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from npu_patch.autoload.entry import AUTOLOAD, GROUP
from npu_patch.commands.console.output_file import why_no_file_can_be_made
from npu_patch.commands.console.terminal import Steps
from npu_patch.commands.doctor.cann import Cann, find_cann
from npu_patch.commands.doctor.processes import Answer, Processes, Question, too_long
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
    "npu_rms_norm_backward": "rms_norm, of 1 + weight",
    "npu_gemma_rms_norm": "rms_norm, of 1 + weight",
    "npu_fast_gelu": "approximate_gelu",
    "npu_rotary_mul": "rope",
    "npu_swiglu": "swiglu, experts",
    "npu_fusion_attention": "attention",
    "npu_fusion_attention_v2": "attention with sinks",
    "npu_fused_infer_attention_score": "attention of single tokens, over pages too",
    "npu_scatter_pa_kv_cache": "generate_batch: new tokens into pages",
    "npu_moe_token_permute": "experts",
    "npu_grouped_matmul": "experts",
    "npu_moe_token_unpermute": "experts",
    "npu_chunk_gated_delta_rule": "gated delta nets: declined",
    "npu_recurrent_gated_delta_rule": "gated delta nets, where recurrent_bf16 asks for it",
    "npu_fused_causal_conv1d": "gated delta nets: declined",
    "npu_cross_entropy_loss": "cross_entropy",
    "npu_dynamic_quant": "w8a8",
    "npu_quant_matmul": "w8a8",
    "npu_dequant_swiglu_quant": "w8a8_experts",
    "npu_format_cast": "weight_nz",
    "npu_prefetch": "prefetch",
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


def at_first_sight(
    running: Processes, python: str, environ: Mapping[str, str], *, timeout: float, simulated: bool = False
) -> Findings:
    """What takes no import to see; answers to everything else are empty."""
    listed = running.ask(python, environ, timeout, "distributions")
    return Findings(
        python,
        tuple((name, version, folder) for name, version, folder in listed.found or ()),
        {},
        Answer(),
        Answer(),
        find_cann(environ),
        simulated,
        dict(environ),
        tuning_file=_tuning_file(environ),
        times_file=_times_file(environ),
        entries=running.ask(python, environ, timeout, "entry_points", GROUP),
    )


def look(running: Processes, seen: Findings, *, timeout: float, progress: Steps) -> Findings:
    """What was seen at first sight, and what each import gives. Two processes are asked everything in turn, for most of
    the time goes by in importing torch; what has no good answer there is asked in a process of its own, which tells a
    fault from what follows from another one. Each answer has `timeout` seconds."""
    installed = [name for name in PACKAGES if any(same(name, each[0]) for each in seen.distributions)]
    mode = "simulated" if seen.simulated else "as it is"
    imports = {name: ("package", mode, name) for name in dict.fromkeys(PACKAGES[name] for name in installed)}
    device, providers = ("torch_npu", mode, *OPERATORS), ("providers", mode)
    progress.of(len(imports) + 2)

    def alone(question: Question) -> Answer:
        answer = running.ask(seen.python, seen.environ, timeout, *question)
        progress.done()
        return answer

    def in_turn(questions: Sequence[Question]) -> Mapping[Question, Answer]:
        return running.ask_in_turn(seen.python, seen.environ, timeout, questions, progress.done)

    pool = ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 1))
    try:
        groups = [pool.submit(in_turn, group) for group in ((device, providers), tuple(imports.values())) if group]
        answers = {question: answer for group in groups for question, answer in group.result().items()}
        rest = [question for question in (device, providers, *imports.values()) if question not in answers]
        answers |= zip(rest, pool.map(alone, rest), strict=True)
        broken = {name: question for name, question in imports.items() if _is_refusal(answers[question], timeout)}
        if seen.simulated or seen.environ.get(AUTOLOAD) == "0":
            broken = {}
        without_torch_npu = pool.map(lambda name: alone(("package", "alone", name)), broken)
        return replace(
            seen,
            imports={name: answers[question] for name, question in imports.items()},
            torch_npu=answers[device],
            providers=answers[providers],
            alone=dict(zip(broken, without_torch_npu, strict=True)),
        )
    except BaseException:  # Ctrl-C: nobody waits for an answer any more
        pool.shutdown(wait=False, cancel_futures=True)
        running.kill()
        raise
    finally:
        pool.shutdown(wait=False)


def _is_refusal(answer: Answer, timeout: float) -> bool:
    return answer.error not in (None, too_long(timeout))


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
