"""The switches: what the user asked for. The only reader of `TWINKLE_NPU_*` environment variables.

`resolve()` runs once per `apply()` and returns a frozen `Switches`. Keyword arguments of `apply` win over the
environment, a switch of its own wins over its group, and `TWINKLE_NPU_PATCH=0` turns everything off.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from npu_patch import log

PREFIX = "TWINKLE_NPU_"
TUNE = PREFIX + "TUNE"  # a file, not a switch
UNASKED, REPORT = PREFIX + "AUTO", PREFIX + "REPORT"  # of the processes in which apply() runs by itself; REPORT: a file
TRUE_WORDS = ("1", "true", "on", "yes")
FALSE_WORDS = ("0", "false", "off", "no")
AUTO = "auto"
Value = bool | str | None


@dataclass(frozen=True)
class Switch:
    """One switch: the environment variable `TWINKLE_NPU_<variable>`, the keyword `name` of `apply()`, or of `of`.

    `kind`: "on/off", "auto" (on, off, or as `AUTO` finds best), or "path" of a file (None: the usual place).
    """

    name: str
    variable: str
    default: Value
    gates: str
    group: str | None = None  # the switch that has to be on for this one's default
    aliases: tuple[str, ...] = ()
    kind: str = "on/off"
    of: str = "apply()"


SWITCHES: tuple[Switch, ...] = (
    Switch("patch", "PATCH", True, "everything"),
    Switch("fused_ops", "FUSED_OPS", True, "RMSNorm, RoPE, SwiGLU and attention together"),
    Switch("rms_norm", "RMS_NORM", True, "RMSNorm", group="fused_ops"),
    Switch("rope", "ROPE", True, "rotary position embedding", group="fused_ops"),
    Switch("swiglu", "SWIGLU", True, "SwiGLU feed-forward layers", group="fused_ops"),
    Switch("sdpa", "SDPA", True, "attention", group="fused_ops"),
    Switch("moe_patch", "MOE_PATCH", True, "grouped-matmul experts", aliases=("GMM_PATCH",)),
    Switch("fla", "FLA", True, "gated delta rule, causal conv1d and its update"),
    Switch("lora", "LORA", True, "linear layers with a LoRA adapter of peft's"),
    Switch("loss", "LOSS", True, "losses and log-probabilities of tokens without logits"),
    Switch("vision", "VISION", True, "what vision towers have: the next five together"),
    Switch("vision_attention", "VISION_ATTENTION", True, "attention within segments in one call", group="vision"),
    Switch("vision_on_host", "VISION_ON_HOST", True, "grids and token ids of images known on the host", group="vision"),
    Switch("approximate_gelu", "APPROXIMATE_GELU", True, "approximations of GELU in one operator", group="vision"),
    Switch(
        "patch_embedding", "PATCH_EMBEDDING", AUTO, "patch embeddings as products over patches", "vision", kind="auto"
    ),
    Switch(
        "head_padding", "HEAD_PADDING", AUTO, "attention heads padded to widths of the cube unit", "vision", kind="auto"
    ),
    Switch("inference", "INFERENCE", True, "generation within the training process: the next six together"),
    Switch(
        "captured_decode", "CAPTURED_DECODE", True, "decode steps over a static cache captured in a graph", "inference"
    ),
    Switch("continuous_batching", "CONTINUOUS_BATCHING", True, "generate_batch: graphs, paged attention", "inference"),
    Switch(
        "recurrent_bf16", "RECURRENT_BF16", False, "the gated delta rule's state in bfloat16 in decoding", "inference"
    ),
    Switch("weight_nz", "WEIGHT_NZ", False, "frozen weights in the layout of the cube unit", "inference"),
    Switch("prefetch", "PREFETCH", False, "the next product's weight fetched into the L2 cache", "inference"),
    Switch("mtp", "MTP", False, "drafts of linear attention models: heads of several tokens, rollback", "inference"),
    Switch("w8a8", "W8A8", True, "int8 weights: loading, and computing in int8"),
    Switch("gated_rmsnorm_fp32", "GATED_RMSNorm_FP32", False, "gated RMSNorm computed in float32"),
    Switch("swiglu_recompute", "SWIGLU_RECOMPUTE", AUTO, "making SwiGLU's product again in the backward", kind="auto"),
    Switch("triton", "TRITON", AUTO, "Triton kernels beside torch_npu's operators", kind="auto"),
    Switch(
        "triton_cache",
        "TRITON_CACHE",
        None,
        "the file that keeps the times of Triton kernels and the verdicts on operators",
        kind="path",
    ),
    Switch("self_check", "SELF_CHECK", True, "checking operators on a real device against float64 before they serve"),
    Switch(
        "sequence_parallel",
        "SEQUENCE_PARALLEL",
        True,
        "dividing sequences among ranks by npu_patch.sequence_parallel; off, each rank has whole ones",
        of="SequenceParallel()",
    ),
)
BY_NAME: Mapping[str, Switch] = MappingProxyType({switch.name: switch for switch in SWITCHES})


@dataclass(frozen=True)
class Switches:
    """The resolved switches. `switches["rope"]` is its value; `switches.sources["rope"]` says where it came from.
    `tune`: the file of `python -m npu_patch tune`, if one is given."""

    values: Mapping[str, Value]
    sources: Mapping[str, str]
    tune: str | None = None

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


def resolve(
    keywords: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None, of: str = "apply()"
) -> Switches:
    """Reads every switch once; `of`: whose keywords these are.

    Raises `ValueError` naming the variable (or keyword), its value and what is accepted; warns about an unknown
    `TWINKLE_NPU_*` variable, naming the closest real one.
    """
    environ = os.environ if environ is None else environ
    keywords = keywords or {}
    _check_keywords(keywords, of)
    for fact in unknown_variables(environ):
        log.warning(fact)

    values: dict[str, Value] = {}
    sources: dict[str, str] = {}
    for switch in SWITCHES:  # a group stands before its members
        if switch.name in keywords:
            values[switch.name] = _keyword_value(switch, keywords[switch.name])
            sources[switch.name] = _said(switch, values[switch.name])
            continue
        found = _read_environment(switch, environ)
        if found is not None:
            values[switch.name], sources[switch.name] = found
        elif switch.group is not None:
            values[switch.name] = switch.default if values[switch.group] else False
            sources[switch.name] = sources[switch.group]
        else:
            values[switch.name], sources[switch.name] = switch.default, "default"
    return Switches(MappingProxyType(values), MappingProxyType(sources), environ.get(TUNE) or None)


@dataclass(frozen=True)
class Unasked:
    """Whether `apply()` runs by itself, and what becomes of its report when the process ends: printed, written to
    `file`, or neither."""

    wanted: bool
    printed: bool = False
    file: str | None = None


def unasked(environ: Mapping[str, str] | None = None) -> Unasked:
    """
    Raises:
        ValueError: naming the variable, its value and what is accepted.
    """
    environ = os.environ if environ is None else environ
    word = environ.get(UNASKED, "").strip().lower()
    if word in ("", *FALSE_WORDS):
        return Unasked(False)
    if word not in (*TRUE_WORDS, "report"):
        accepted = f"report, {'/'.join(TRUE_WORDS)} and {'/'.join(FALSE_WORDS)}"
        raise ValueError(f"{UNASKED}={environ[UNASKED]!r}: accepted are {accepted}")
    file = os.path.abspath(environ[REPORT]) if environ.get(REPORT) else None
    return Unasked(True, word == "report" and file is None, file)


def set_for_children(
    values: Mapping[str, Value], report: str | None, environ: MutableMapping[str, str] | None = None
) -> None:
    """Puts switches, by their keywords, and `apply()` by itself into an environment that processes inherit. `report`:
    the file for it, or "-" to print it."""
    environ = os.environ if environ is None else environ
    for name, value in values.items():
        switch = BY_NAME[name]
        variables = [PREFIX + variable for variable in (switch.variable, *switch.aliases)]
        for variable in (variables[0], *(alias for alias in variables[1:] if alias in environ)):
            environ[variable] = str(int(value)) if isinstance(value, bool) else str(value)
    if report == "-":
        environ.pop(REPORT, None)
    elif report is not None:
        environ[REPORT] = report
    environ[UNASKED] = "report" if report == "-" or unasked(environ).printed else "1"


def _check_keywords(keywords: Mapping[str, Any], of: str) -> None:
    known = {switch.name: switch for switch in SWITCHES if switch.of == of}
    for name, value in keywords.items():
        if name not in known:
            raise TypeError(
                f"{of} got the unknown switch {name!r}{_closest(name, known)}; accepted: {', '.join(known)}"
            )
        _keyword_value(known[name], value)


def _said(switch: Switch, value: Any) -> str:
    return f"{switch.of.removesuffix(')')}{switch.name}={value!r})"


def _keyword_value(switch: Switch, value: Any) -> Value:
    if switch.kind == "path":
        if value is None or isinstance(value, (str, os.PathLike)):
            return None if value is None else os.fspath(value)
        raise ValueError(f"{_said(switch, value)}: accepted are a path and None")
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    if switch.kind == "auto" and isinstance(value, str) and value == AUTO:
        return AUTO
    auto = f"{AUTO!r}, " if switch.kind == "auto" else ""
    raise ValueError(f"{_said(switch, value)}: accepted are {auto}True (or 1) and False (or 0)")


def _read_environment(switch: Switch, environ: Mapping[str, str]) -> tuple[Value, str] | None:
    found: dict[str, Value] = {}
    for variable in (switch.variable, *switch.aliases):
        full_name = PREFIX + variable
        if full_name in environ:
            found[full_name] = _environment_value(switch, full_name, environ[full_name])
    if len(set(found.values())) > 1:
        both = " and ".join(f"{name}={environ[name]!r}" for name in found)
        raise ValueError(f"{both} contradict each other: they name the same switch ({switch.gates})")
    for full_name, value in found.items():
        return value, full_name
    return None


def _environment_value(switch: Switch, name: str, text: str) -> Value:
    if switch.kind == "path":
        return text or None
    word = text.strip().lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    if switch.kind == "auto" and word == AUTO:
        return AUTO
    auto = f"{AUTO}, " if switch.kind == "auto" else ""
    raise ValueError(f"{name}={text!r}: accepted are {auto}{'/'.join(TRUE_WORDS)} and {'/'.join(FALSE_WORDS)}")


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """In words, each variable with our prefix that is no switch."""
    variables = [variable for switch in SWITCHES for variable in (switch.variable, *switch.aliases)]
    known = [TUNE, UNASKED, REPORT, *(PREFIX + variable for variable in variables)]
    unknown = [name for name in environ if name.startswith(PREFIX) and name not in known]
    return [f"unknown environment variable {name}{_closest(name, known)}" for name in unknown]


def _closest(name: str, known: Mapping[str, object] | list[str]) -> str:
    import difflib

    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f" (did you mean {match[0]}?)" if match else ""
