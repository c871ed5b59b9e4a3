"""What is known to break, how to see it, and what to do. A table; each row looks at `Findings` and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from npu_patch.autoload.entry import why_no_entry
from npu_patch.commands.doctor.findings import Findings
from npu_patch.switches import (
    FALSE_WORDS,
    PREFIX,
    SWITCHES,
    TUNE,
    UNASKED,
    Switch,
    resolve,
    unasked,
    unknown_variables,
)


@dataclass(frozen=True)
class Fault:
    """`seen(findings)` says what is wrong, or None. `remedy`: what to do. Not `serious`: worth knowing, and no more."""

    name: str
    seen: Callable[[Findings], str | None]
    remedy: str
    serious: bool = True


@dataclass(frozen=True)
class Complaint:
    fault: str
    what: str
    remedy: str
    serious: bool


def complaints(findings: Findings) -> Iterator[Complaint]:
    """Serious ones first."""
    found = [(fault, fault.seen(findings)) for fault in FAULTS]
    for fault, what in sorted(found, key=lambda pair: not pair[0].serious):
        if what is not None:
            yield Complaint(fault.name, what, fault.remedy, fault.serious)


def _python(findings: Findings) -> str | None:
    return "no distribution can be listed" if not findings.distributions else None


def _two_tritons(findings: Findings) -> str | None:
    one, other = findings.version("triton"), findings.version("triton-ascend")
    if one is None or other is None:
        return None
    return f"triton {one} and triton-ascend {other} are both installed, and both own the folder triton"


def _no_torch(findings: Findings) -> str | None:
    if findings.version("torch") is None:
        return "torch is not installed"
    error = _error_alone(findings, "torch")
    return None if error is None else f"torch {findings.version('torch')} cannot be imported: {error}"


def _no_torch_npu(findings: Findings) -> str | None:
    return "torch_npu is not installed" if findings.version("torch_npu") is None else None


def _mismatch(findings: Findings) -> str | None:
    torch, npu = findings.release("torch"), findings.release("torch_npu")
    if torch is None or npu is None or torch[:3] == npu[:3]:
        return None
    return f"torch {findings.version('torch')} with torch_npu {findings.version('torch_npu')}"


def _no_cann(findings: Findings) -> str | None:
    if findings.version("torch_npu") is None or findings.simulated or findings.cann.home or findings.cann.loadable:
        return None
    return f"torch_npu {findings.version('torch_npu')} is installed, CANN is not{_consequence(findings)}"


def _cann_not_set_up(findings: Findings) -> str | None:
    cann = findings.cann
    if findings.version("torch_npu") is None or findings.simulated or cann.home is None or cann.loadable:
        return None
    return f"CANN is in {cann.home}, its libraries are not on LD_LIBRARY_PATH{_consequence(findings)}"


def _consequence(findings: Findings) -> str:
    return f" ({findings.torch_npu.error})" if findings.torch_npu.error else ""


def _torch_npu_broken(findings: Findings) -> str | None:
    explained = (_no_torch, _no_torch_npu, _mismatch, _no_cann, _cann_not_set_up)
    if findings.torch_npu.error is None or any(explanation(findings) for explanation in explained):
        return None
    return f"torch_npu {findings.version('torch_npu')} cannot be imported: {findings.torch_npu.error}"


def _no_npu(findings: Findings) -> str | None:
    if findings.torch_npu.found is None or findings.torch_npu.found["available"]:
        return None
    return f"torch.npu.is_available() is False; devices of the driver: {', '.join(findings.cann.devices) or 'none'}"


def _placeholder(findings: Findings) -> str | None:
    version = findings.version("mindspeed")
    if version is None or not re.fullmatch(r"0\.0\.\d+(\.?dev\d+)?", version):
        return None
    return f"mindspeed {version} is a placeholder on PyPI, not MindSpeed"


def _old_fla(findings: Findings) -> str | None:
    for name in ("flash-linear-attention", "fla-core"):
        version = findings.release(name)
        if version is not None and version <= (0, 5, 2):
            return f"{name} {findings.version(name)}: its Ascend backend was corrected after 0.5.2"
    return None


def _fla_with_cuda_triton(findings: Findings) -> str | None:
    if findings.version("flash-linear-attention") is None and findings.version("fla-core") is None:
        return None
    if findings.version("triton-ascend") is not None:
        return None
    return "fla is installed without triton-ascend: its kernels cannot run on an NPU"


def _fla_asks_for_a_newer_triton(findings: Findings) -> str | None:
    """0.6.0 asks for triton-ascend 3.6.0, which the package index does not have."""
    fla, triton = findings.release("fla-core"), findings.release("triton-ascend")
    if fla is None or triton is None or fla < (0, 6, 0) or triton >= (3, 6, 0):
        return None
    return (
        f"fla-core {findings.version('fla-core')} asks for triton-ascend 3.6.0, "
        f"here is {findings.version('triton-ascend')}: the compiler of 3.2.0 refuses chunk_dqkwg_bwd_kernel_full, "
        "of the gated delta rule's gradient, at heads of 128"
    )


def _triton_is_not_ascends(findings: Findings) -> str | None:
    """An upgrade of torch brings the triton of GPUs."""
    version = findings.version("triton")
    if version is None or findings.version("triton-ascend") is not None or findings.version("torch_npu") is None:
        return None
    return f'triton {version} without triton-ascend: it has no driver for an NPU ("0 active drivers")'


# What triton-ascend imports without declaring it.
UNDECLARED = ("pybind11", "attrs", "decorator", "pyyaml")


def _undeclared(findings: Findings) -> str | None:
    version = findings.version("triton-ascend")
    absent = [name for name in UNDECLARED if findings.version(name) is None]
    if version is None or not absent:
        return None
    return f"triton-ascend {version} imports {', '.join(absent)} and does not bring them"


def _new_transformers(findings: Findings) -> str | None:
    version = findings.release("transformers")
    if version is None or version[:2] <= (5, 24):
        return None
    return f"transformers {findings.version('transformers')} is newer than any this npu_patch was tested with (5.24)"


def _numpy(findings: Findings) -> str | None:
    numpy = findings.release("numpy")
    if numpy is None or numpy < (2, 3) or findings.version("triton-ascend") is None:
        return None
    return f"numpy {findings.version('numpy')} with triton-ascend {findings.version('triton-ascend')}"


def _old_transformers(findings: Findings) -> str | None:
    version = findings.release("transformers")
    if version is not None and version < (4, 57):
        return f"transformers {findings.version('transformers')} is older than 4.57"
    return "transformers is not installed" if version is None else None


# From which transformers on, which kernels it accepts: from, to below; outside it silently uses stubs instead.
KERNELS = (
    ((5, 23), (0, 18, 2), (0, 19)),
    ((5, 18), (0, 17), (0, 18)),
    ((5, 15), (0, 16), (0, 17)),
    ((5, 13), (0, 15, 2), (0, 16)),
    ((5, 0), (0, 9), (99,)),
)


def _kernels(findings: Findings) -> str | None:
    kernels, transformers = findings.release("kernels"), findings.release("transformers")
    if kernels is None or transformers is None:
        return None
    for since, least, below in KERNELS:
        if transformers >= since:
            if least <= kernels < below:
                return None
            wanted = f">={'.'.join(map(str, least))}" + (f",<{'.'.join(map(str, below))}" if below < (99,) else "")
            return (
                f"kernels {findings.version('kernels')} with transformers {findings.version('transformers')}, which "
                f"takes kernels{wanted} and passes over any other"
            )
    return None


def _others_broken(findings: Findings) -> str | None:
    """Not those that only pass on what torch or torch_npu raised."""
    explained = (None, _error_alone(findings, "torch"), findings.torch_npu.error)
    errors = {name: _error_alone(findings, name) for name in findings.imports if name not in ("torch", "torch_npu")}
    broken = [f"{name}: {error}" for name, error in errors.items() if error not in explained]
    return f"cannot be imported: {'; '.join(broken)}" if broken else None


def _twice(findings: Findings) -> str | None:
    seen: dict[tuple[str, str], set[str]] = {}
    for name, version, folder in findings.distributions:
        seen.setdefault((re.sub(r"[-_.]+", "-", name).lower(), folder), set()).add(version)
    twice = [f"{name} {' and '.join(sorted(v))} in {folder}" for (name, folder), v in seen.items() if len(v) > 1]
    return "; ".join(twice) or None


def _switch(findings: Findings) -> str | None:
    return "; ".join(wrong_switches(findings.environ).values()) or None


def wrong_switches(environ: Mapping[str, str]) -> dict[str, str]:
    """By the switch's name, what is wrong with the value that the environment gives it."""
    wrong = {}
    for switch in SWITCHES:
        try:
            resolve({}, {name: environ[name] for name in variables_of(switch) if name in environ})
        except ValueError as error:
            wrong[switch.name] = str(error)
    return wrong


def variables_of(switch: Switch) -> list[str]:
    return [PREFIX + variable for variable in (switch.variable, *switch.aliases)]


def _foreign_tuning_file(findings: Findings) -> str | None:
    content = findings.tuning_file.found
    if content is None:
        return None
    chips = [f"simulated {chip}" if findings.simulated else chip for chip in _chips(findings)]
    if content["chip"] not in chips and chips:
        return f"{findings.environ[TUNE]} was measured on {content['chip']}, this is {chips[0]}"
    for name in ("torch", "torch_npu", "triton", "triton-ascend", "transformers"):
        there, here = content["versions"].get(name), findings.version(name)
        if there != here:
            return f"{findings.environ[TUNE]} was measured with {name} {there}, here is {here}"
    return None


def _chips(findings: Findings) -> list[str]:
    return (findings.torch_npu.found or {}).get("chips", [])


def _unknown_variable(findings: Findings) -> str | None:
    return "; ".join(unknown_variables(findings.environ)) or None


def why_not_by_itself(findings: Findings) -> str | None:
    """Why `apply()` does not run by itself in scripts that nobody edits, or None."""
    try:
        wanted = unasked(findings.environ).wanted
    except ValueError as error:
        return str(error)
    if not wanted:
        return f"{UNASKED} is not set" if not findings.environ.get(UNASKED) else f"switched off by {UNASKED}"
    entries = findings.entries.found
    if entries is None:
        return f"entry points cannot be told: {findings.entries.error}"
    return why_no_entry(entries, findings.release("torch"), findings.environ)


def _unasked(findings: Findings) -> str | None:
    """Only where it is wanted."""
    reason = why_not_by_itself(findings)
    if reason is None or findings.environ.get(UNASKED, "").strip().lower() in ("", *FALSE_WORDS):
        return None
    return reason if reason.startswith(UNASKED) else f"{UNASKED}={findings.environ[UNASKED]} does nothing: {reason}"


def _autoload(findings: Findings) -> str | None:
    if findings.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0" or findings.version("torch_npu") is None:
        return None
    return "TORCH_DEVICE_BACKEND_AUTOLOAD=0: torch does not load torch_npu by itself"


def _error_alone(findings: Findings, module: str) -> str | None:
    """What is wrong with the module itself, and not with the torch_npu that torch loads."""
    answer = findings.alone.get(module, findings.imports.get(module))
    return None if answer is None else answer.error


FAULTS: tuple[Fault, ...] = (
    Fault("no packages", _python, "Check the interpreter and the virtual environment: nothing is installed in it."),
    Fault("torch", _no_torch, "pip install torch, in the version that your torch_npu names."),
    Fault("no torch_npu", _no_torch_npu, "pip install torch_npu, in the version of your torch."),
    Fault(
        "torch and torch_npu",
        _mismatch,
        "They must be of one release: pip install torch_npu==<the version of torch>, or the other way round.",
    ),
    Fault(
        "no CANN",
        _no_cann,
        "Install the CANN toolkit and kernels, then source its set_env.sh. Until then TORCH_DEVICE_BACKEND_AUTOLOAD=0 "
        "lets torch be imported; transformers' model files still import torch_npu, if it is installed.",
    ),
    Fault("CANN not set up", _cann_not_set_up, "source set_env.sh of that CANN, in every shell and service."),
    Fault("torch_npu", _torch_npu_broken, "Compare the CANN version with the one this torch_npu was built for."),
    Fault(
        "no NPU",
        _no_npu,
        "Check the driver with npu-smi info, /dev/davinci* in the container, and ASCEND_RT_VISIBLE_DEVICES.",
    ),
    Fault(
        "triton and triton-ascend",
        _two_tritons,
        "pip uninstall -y triton triton-ascend, then install triton-ascend alone: whichever came last overwrote "
        "files of the other.",
    ),
    Fault(
        "mindspeed placeholder",
        _placeholder,
        "pip uninstall mindspeed, then install it from https://gitcode.com/Ascend/MindSpeed (core_r0.16.0 or newer).",
    ),
    Fault("old fla", _old_fla, "Install a newer flash-linear-attention; until then its kernels are not used."),
    Fault(
        "older triton than fla asks for",
        _fla_asks_for_a_newer_triton,
        "Install triton-ascend 3.6.0 where you can get it; until then the self-check declines what does not compile.",
        serious=False,
    ),
    Fault("fla without triton-ascend", _fla_with_cuda_triton, "Install triton-ascend.", serious=False),
    Fault(
        "triton is not Ascend's",
        _triton_is_not_ascends,
        "pip uninstall -y triton, then install triton-ascend; again after each upgrade of torch.",
        serious=False,
    ),
    Fault(
        "triton-ascend's imports",
        _undeclared,
        "pip install pybind11 attrs decorator pyyaml. Without them its kernels do not compile.",
        serious=False,
    ),
    Fault("numpy and triton-ascend", _numpy, "pip install 'numpy<2.3'."),
    Fault("transformers", _old_transformers, "pip install 'transformers>=4.57'."),
    Fault(
        "new transformers",
        _new_transformers,
        "What it cannot recognise stays as it is: python -m npu_patch coverage MODEL says what.",
        serious=False,
    ),
    Fault("kernels", _kernels, "Install the version named, or none.", serious=False),
    Fault("packages that break", _others_broken, "Reinstall them, or uninstall those that are not needed."),
    Fault("two versions in one place", _twice, "pip uninstall the package until it is gone, then install it once."),
    Fault("switch", _switch, "Correct or unset the variable."),
    Fault(
        "patching by itself",
        _unasked,
        "Until then: python -m npu_patch run script.py, or npu_patch.apply() in the script.",
    ),
    Fault(
        "tuning file",
        lambda findings: findings.tuning_file.error,
        "Correct or unset the variable: until then apply() raises.",
    ),
    Fault(
        "tuning file from elsewhere",
        _foreign_tuning_file,
        "Write one here: python -m npu_patch tune MODEL --output FILE. Until then apply() does not follow it.",
        serious=False,
    ),
    Fault(
        "file of times",
        lambda findings: findings.times_file.error,
        "Name a file that can be written: until then each process measures Triton kernels anew.",
        serious=False,
    ),
    Fault("unknown variable", _unknown_variable, "Correct or unset the variable: it does nothing.", serious=False),
    Fault("autoload", _autoload, "import torch_npu before the first use of a device.", serious=False),
)
