"""The vendor's own unit tests of its operators, on the simulated NPU (on a machine with a real one, on that).

python scripts/vendor_tests.py CHECKOUT [PATTERN...] [--json FILE] [--timeout SECONDS] [--before FILE]

CHECKOUT is the user's own copy of Ascend's op-plugin or pytorch repository (its test folder is what counts); nothing
of it is part of this project. PATTERN is a part of a test file's path below test/, or a glob; without any, the
operators of transformers training in `OPERATORS`. Their tests need: pip install expecttest einops.

Each file runs in a process of its own. A row of the table: tests, passed, failed, skipped, errors, and the first
reason. `failed` is an assertion, `errors` any other exception, a crash or the time limit. The exit code is 1 if any.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

OPERATORS = (
    "rotary_mul",
    "*test_npu_rms_norm.py",
    "*test_npu_rms_norm_backward.py",
    "*test_npu_add_rms_norm.py",
    "gemma_rms_norm",
    "*test_*swiglu.py",
    "geglu",
    "*test_npu_grouped_matmul.py",
    "*test_npu_dynamic_quant.py",
    "*test_npu_add_rms_norm_dynamic_quant.py",
    "*test_npu_trans_quant_param.py",
    "moe_token",
    "*test_npu_moe_init_routing.py",
    "*test_npu_moe_gating_top_k_softmax.py",
    "npu_flash_attention",
    "*test_npu_fused_infer_attention_score.py",
    "incre_flash_attention",
    "prompt_flash_attention",
    "apply_rotary_pos_emb",
    "cross_entropy_loss",
    "scaled_masked_softmax",
    "apply_adam_w",
    "confusion_transpose",
    "group_norm_silu",
    "dropout",
    "lstm",
    "gru",
    "renorm",
    "*test_base_ops/test_softmax*",
    "*test_log_softmax*",
    "fast_gelu",
    "dtype_cast",
    "one_hot",
    "non_finite_check",
)
FOR_ONE_TORCH = re.compile(r"test_v\d+r\d+_ops")  # folders of op-plugin that test older releases of torch
OUTCOMES = ("passed", "failed", "skipped", "errors")


@dataclass(frozen=True)
class Counts:
    """How the tests of one file ended. `reason`: of the first that failed or raised, else of the first skipped one."""

    file: str
    tests: int
    passed: int
    failed: int
    skipped: int
    errors: int
    reason: str


class Recorder(unittest.TestResult):
    """Writes one line of JSON for each test as it ends, so that a crash or a time limit loses none."""

    def __init__(self, to: Path) -> None:
        super().__init__()
        self._lines = to.open("w")

    def _write(self, test: unittest.TestCase, outcome: str, reason: str = "") -> None:
        print(json.dumps({"test": str(test), "outcome": outcome, "reason": reason}), file=self._lines, flush=True)

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self._sub_tests_failed = False

    def addSuccess(self, test: unittest.TestCase) -> None:
        if not self._sub_tests_failed:
            self._write(test, "passed")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self._write(test, "skipped", reason)

    def addFailure(self, test: unittest.TestCase, err: tuple) -> None:
        self._write(test, "failed", _in_one_line(err[1]))

    def addError(self, test: unittest.TestCase, err: tuple) -> None:
        self._write(test, "errors", _in_one_line(err[1]))

    def addExpectedFailure(self, test: unittest.TestCase, err: tuple) -> None:
        self._write(test, "passed")

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:
        self._write(test, "failed", "was expected to fail")

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: tuple | None) -> None:
        if err is not None and not self._sub_tests_failed:
            self._sub_tests_failed = True
            self._write(test, "failed" if issubclass(err[0], AssertionError) else "errors", _in_one_line(err[1]))


def _in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def run_here(file: Path, to: Path) -> None:
    """Run one file's tests in this process."""
    from npu_patch import simulator

    if simulator.real_device() is None:
        simulator.start()
    sys.path.insert(0, str(file.parent))
    sys.argv = [str(file)]
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    unittest.defaultTestLoader.loadTestsFromModule(module).run(Recorder(to))


def run_apart(file: Path, root: Path, timeout: float) -> Counts:
    """Run one file's tests in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "lines"
        command = [sys.executable, __file__, "--one", str(file), str(to)]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False)
            ending = None
            if done.returncode:
                words = (done.stderr.strip().splitlines() or ["no message"])[-1]
                ending = f"the process ended with {done.returncode}: {words}"[:300]
        except subprocess.TimeoutExpired:
            ending = f"not done after {timeout:g} s"
        lines = [json.loads(line) for line in to.read_text().splitlines()] if to.exists() else []
    return count(file.relative_to(root).as_posix(), lines, ending)


def count(file: str, lines: Sequence[dict[str, str]], ending: str | None) -> Counts:
    """`ending`: how the process ended, unless well; that is one more error."""
    number = {outcome: sum(line["outcome"] == outcome for line in lines) for outcome in OUTCOMES}
    if ending is not None:
        number["errors"] += 1
    wrong = [line["reason"] for line in lines if line["outcome"] in ("failed", "errors")]
    reasons = [*wrong, *([ending] if ending else []), *(x["reason"] for x in lines if x["outcome"] == "skipped"), ""]
    return Counts(file, sum(number.values()), **number, reason=reasons[0])


def files_of(root: Path, patterns: Iterable[str]) -> list[Path]:
    """The test files below `root` that match any pattern."""
    found = []
    for path in sorted(root.rglob("test_*.py")):
        name = path.relative_to(root).as_posix()
        if FOR_ONE_TORCH.search(name):
            continue
        if any(fnmatch(name, p) if set(p) & set("*?[") else p in name for p in patterns):
            found.append(path)
    return found


def table(rows: Sequence[Counts], before: dict[str, Counts]) -> str:
    """One line for each file and one for all; with `before`, what passed then beside what passes now."""
    width = max((len(row.file) for row in rows), default=4)
    columns = ["tests", *(["before"] if before else []), *OUTCOMES]
    lines = [f"{'file':<{width}} " + " ".join(f"{name:>7}" for name in columns) + "  first reason"]
    everything = Counts("all", *(sum(getattr(row, name) for row in rows) for name in ("tests", *OUTCOMES)), reason="")
    then = dict(before, all=Counts("all", 0, sum(row.passed for row in before.values()), 0, 0, 0, ""))
    for row in (*rows, everything):
        numbers = [row.tests, *([then[row.file].passed if row.file in then else "-"] if before else [])]
        numbers += [getattr(row, outcome) for outcome in OUTCOMES]
        lines.append(f"{row.file:<{width}} " + " ".join(f"{n:>7}" for n in numbers) + f"  {row.reason[:160]}".rstrip())
    return "\n".join(lines)


def read(file: Path) -> dict[str, Counts]:
    return {row["file"]: Counts(**row) for row in json.loads(file.read_text())}


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--one"]:
        run_here(Path(arguments[1]), Path(arguments[2]))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="a copy of op-plugin or of pytorch")
    parser.add_argument("patterns", nargs="*", help="parts of paths below test/, or globs; default: common operators")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each file (default 300)")
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    parser.add_argument("--before", type=Path, help="an earlier --json file, to show beside")
    options = parser.parse_args(arguments)
    root = options.checkout / "test"
    if not root.is_dir():
        parser.error(f"{options.checkout} has no folder test: give a checkout of Ascend's op-plugin or pytorch")
    if options.before and not options.before.is_file():
        parser.error(f"--before {options.before} is not a file: give one that --json has written")
    files = files_of(root, options.patterns or OPERATORS)
    if not files:
        parser.error(f"no test file below {root} matches {' '.join(options.patterns or OPERATORS)}")
    before = read(options.before) if options.before else {}
    rows = []
    for file in files:
        rows.append(run_apart(file.resolve(), root.resolve(), options.timeout))
        print(f"{len(rows)}/{len(files)} {rows[-1].file}: {rows[-1].passed} of {rows[-1].tests}", file=sys.stderr)
    print(table(rows, {name: row for name, row in before.items() if name in {row.file for row in rows}}))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return int(any(row.failed or row.errors for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
