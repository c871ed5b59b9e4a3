"""Makes torch's CUDA build, the only one that PyPI has, serve torch_npu, which asks for the CPU build.

python scripts/without_cuda.py FOLDER     # site-packages with torch in it, installed with --no-deps

Next to torch's libraries comes one for each of CUDA's that they need, in which every function answers
cudaErrorNoDevice: no gigabytes of CUDA, and torch.cuda.is_available() is False. And torch's own allocator for CUDA
lets go of the settings that torch_npu's has too: from 2.10 on, the second to register a name ends the process at load
("Duplicated key 'pinned_reserve_segment_size_mb'"). A CPU build stays as it is.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

CUDA = re.compile(r"lib(cu|nccl|nvrtc|nvJitLink|nvToolsExt|nvshmem)")
# How the names that both register are spelt in libc10_cuda.so. The compiler writes a literal in pieces of 16.
RENAMED = {b"_segment_size_mb": b"_segment_size_mB", b"_memory_fraction": b"_memory_fractioN"}
ANSWER, WORDS = "long {0}(void) {{ return 100; }}\n", 'const char *{0}(void) {{ return "no CUDA here"; }}\n'


def main(folder: Path) -> None:
    libraries = [*sorted((folder / "torch/lib").glob("lib*.so*")), *(folder / "torch").glob("_C.*.so")]
    if not libraries:
        sys.exit(f"{folder} has no torch/lib/lib*.so: give the site-packages in which torch is")
    _rename([path for path in libraries if path.name == "libc10_cuda.so"])
    needed = {name for path in libraries for name in _found(r"\(NEEDED\).*\[(.*)\]", "readelf", "-dW", path)}
    needed = {name for name in needed if CUDA.match(name)} - {path.name for path in libraries}
    if not needed:
        return
    asked = {symbol: version for path in libraries for symbol, version in _asked(path)}
    with tempfile.TemporaryDirectory() as work:
        source, versions = Path(work) / "answers.c", Path(work) / "versions"
        source.write_text(
            "".join((WORDS if name.endswith(("String", "Name")) else ANSWER).format(name) for name in sorted(asked))
        )
        versions.write_text("".join(_node(version, asked) for version in sorted({*asked.values()})))
        for name in sorted(needed):
            flags = [f"-Wl,-soname,{name}", f"-Wl,--version-script={versions}"]
            # The loader looks through all of them, so all functions are in each.
            command = ["cc", "-shared", "-fPIC", "-w", *flags, "-o", folder / "torch/lib" / name, source]
            subprocess.run(command, check=True)
    print(f"{folder / 'torch/lib'}: {' '.join(sorted(needed))} without any CUDA")


def _rename(libraries: Iterable[Path]) -> None:
    for library in libraries:
        content = library.read_bytes()
        for before, after in RENAMED.items():
            content = content.replace(before, after)
        library.write_bytes(content)


def _asked(library: Path) -> Iterator[tuple[str, str]]:
    """The functions of CUDA that a library asks others for, and the version that it wants, or ""."""
    symbol = r" U ((?:__)?(?:cu|nccl|nvrtc|nvJitLink|nvtx|nvshmem)\w+)(?:@(\S+))?"
    yield from _found(symbol, "nm", "-D", "--undefined-only", "--with-symbol-versions", library)


def _node(version: str, asked: Mapping[str, str]) -> str:
    symbols = " ".join(f"{symbol};" for symbol, wanted in asked.items() if wanted == version)
    return f"{version} {{ global: {symbols} }};\n" if version else ""


def _found(pattern: str, *command: object) -> list[Any]:
    return re.findall(pattern, subprocess.run(list(map(str, command)), capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
