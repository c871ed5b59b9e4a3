"""Stands in for CANN: checks the machine, compiles cann_stub.c, and loads it under the names that torch_npu needs."""

import ctypes
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .errors import SimulatorError

TESTED_VERSIONS = ("2.9.0", "2.10.0.post7", "2.13.0", "2.14.0")
HERE = Path(__file__).parent
STUB = HERE / "cann_stub.c"
STREAMS = HERE / "cann_streams.c"

# The libraries that torch_npu 2.13.0 is linked against (readelf -d libtorch_npu.so). The dynamic loader takes a library
# that is loaded already for one of the same SONAME, so no search path has to be set.
LIBRARIES = (
    "libascendcl.so",
    "libhccl.so",
    "libacl_op_compiler.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
    "libopapi.so",
    "libms_tools_ext.so",  # looked up by name: a memory checker's functions, for poison
    "libhcomm.so",  # looked up by name: HcclGroupStart and HcclGroupEnd, which libhccl.so has
)
# Each library is made of the stub, unless it is here.
SOURCES = {
    "libascendcl.so": (STUB, STREAMS),
    "libhccl.so": tuple(sorted(HERE.glob("hccl/*.c"))),
    "libopapi.so": (STUB, HERE / "aclnn_padding.c"),
    "libhcomm.so": (),
}
NEEDED = {"libhcomm.so": "libhccl.so"}  # linked against it, so that what is looked up in the one is found in the other

# torch_npu's allocator reports to a memory checker if LD_PRELOAD names this file, and $ASCEND_HOME_PATH/lib64 has the
# library libms_tools_ext.so.
CHECKER = "libascend_kernel_hook.so"

HBM_BYTES = 64 << 30  # Ascend910B3
MOST_DEVICES = 16  # as in cann_stub.c
RANKS = "LOCAL_WORLD_SIZE"

_loaded: list[ctypes.CDLL] = []  # kept open for the life of the process


def load(devices: int | None, any_version: bool, replace_real: bool, poison: bool, torch_may_be_there: bool) -> Path:
    """Check that the stub may stand in for CANN here, load it, and return its folder. Errors: `SimulatorError`."""
    version = _torch_npu_version(any_version)
    if not torch_may_be_there:
        _refuse_early_import()
    if not replace_real:
        _refuse_real_device()
    devices = _devices(devices)
    libraries = _libraries(version)
    for path in libraries:
        _loaded.append(ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL))
    host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Calls resolve to whichever copy of the functions was loaded first; the others' state is never used.
    memory = ctypes.c_uint64(min(HBM_BYTES, host_bytes))
    _loaded[0].simulator_configure(ctypes.c_int(devices), memory, ctypes.c_int(poison))
    return libraries[0].parent


def loaded() -> ctypes.CDLL:
    """The library whose functions and state count."""
    return _loaded[0]


def is_loaded() -> bool:
    return bool(_loaded)


def real_device() -> str | None:
    """The sign of a real CANN or NPU on this machine, in words, or None."""
    for variable in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        if os.environ.get(variable):
            return f"{variable}={os.environ[variable]} is set"
    if Path("/dev/davinci0").exists():
        return "/dev/davinci0 exists"
    if not _loaded:
        try:
            ctypes.CDLL(LIBRARIES[0])
        except OSError:
            return None
        return f"the loader finds {LIBRARIES[0]}"
    return None


def _devices(asked: int | None) -> int:
    """How many; None: one for each rank that a launcher such as torchrun started on this machine."""
    said, value = ("devices", str(asked)) if asked is not None else (RANKS, os.environ.get(RANKS, "1"))
    if not value.isdecimal() or not 1 <= int(value) <= MOST_DEVICES:
        raise SimulatorError(f"{said}={value}: the simulator has 1 to {MOST_DEVICES} devices")
    return int(value)


def _torch_npu_version(any_version: bool) -> str:
    try:
        version = importlib.metadata.version("torch_npu")
    except importlib.metadata.PackageNotFoundError:
        raise SimulatorError(
            f"torch_npu is not installed for {sys.executable}: pip install torch_npu=={TESTED_VERSIONS[-1]}"
        ) from None
    if version not in TESTED_VERSIONS and not any_version:
        raise SimulatorError(
            f"torch_npu {version} is untested here (tested: {', '.join(TESTED_VERSIONS)}): install a tested version, "
            "or pass any_version=True (--any-version)"
        )
    return version


def _refuse_early_import() -> None:
    for module in ("torch_npu", "torch"):
        if module in sys.modules:
            raise SimulatorError(
                f"{module} is imported already: call npu_patch.simulator.start() before anything imports torch, "
                "or run the script with python -m npu_patch.simulator"
            )


def _refuse_real_device() -> None:
    sign = real_device()
    if sign:
        raise SimulatorError(
            f"this machine has a real CANN or NPU ({sign}): use it, or pass replace_real=True (--replace-real) "
            "to simulate one nevertheless"
        )


def _libraries(version: str) -> list[Path]:
    """The compiled libraries, from the cache or newly made."""
    sources = b"".join(path.read_bytes() for path in sorted([*HERE.glob("*.c"), *HERE.glob("hccl/*.[ch]")]))
    key = f"{version}-{hashlib.sha256(sources).hexdigest()[:16]}"
    for parent in _cache_parents():
        folder = parent / key
        if all((folder / name).exists() for name in LIBRARIES):
            return [folder / name for name in LIBRARIES]
    compiler = _compiler()
    for parent in _cache_parents():
        try:
            parent.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=f"{key}-", dir=parent))
        except OSError:
            continue
        return _compile_into(work, parent / key, compiler)
    raise SimulatorError(f"no writable folder for the compiled CANN stub: {', '.join(map(str, _cache_parents()))}")


def _cache_parents() -> list[Path]:
    cache = os.environ.get("XDG_CACHE_HOME")
    folders = [Path(cache)] if cache else []
    if not cache and os.path.expanduser("~") != "~":
        folders = [Path.home() / ".cache"]
    # Only this user may have written what gets loaded from a shared temporary folder.
    temporary = Path(tempfile.gettempdir()) / f"npu_patch-{os.getuid()}"
    if not temporary.exists() or temporary.stat().st_uid == os.getuid():
        folders.append(temporary)
    return [folder / "npu_patch" / "simulator" for folder in folders]


def _compile_into(work: Path, folder: Path, compiler: list[str]) -> list[Path]:
    """Compile in `work`, then rename it to `folder`: a process that starts at the same time sees all or nothing."""
    for name in LIBRARIES:
        sources = SOURCES.get(name, (STUB,))
        command = [*compiler, "-shared", "-fPIC", "-w", "-O1", "-pthread", "-o", str(work / name), *map(str, sources)]
        command += [f"-Wl,-soname,{name}"]
        if name in NEEDED:
            command += ["-Wl,--no-as-needed", str(work / NEEDED[name])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(work, ignore_errors=True)
            reason = (done.stderr.strip().splitlines() or ["no message"])[0]
            names = " ".join(path.name for path in sources) or name
            raise SimulatorError(f"the C compiler {' '.join(compiler)} failed on {names}: {reason}")
    (work / CHECKER).touch()
    (work / "lib64").symlink_to(".")
    try:
        work.rename(folder)
    except OSError:  # another process was first, with the same source
        if not all((folder / name).exists() for name in LIBRARIES):
            return [work / name for name in LIBRARIES]
        shutil.rmtree(work, ignore_errors=True)
    return [folder / name for name in LIBRARIES]


def _compiler() -> list[str]:
    asked = os.environ.get("CC", "").split()
    if asked:
        if shutil.which(asked[0]):
            return asked
        raise SimulatorError(f"CC={' '.join(asked)} is not a program: set CC to a C compiler, or unset it")
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise SimulatorError("no C compiler (cc, gcc, clang) on PATH: install one, for example gcc, or set CC")
