"""python -m npu_patch: what an installation, a model family or a device gives, asked from a terminal.

Each command has a folder, whose `command` has `run(options) -> Result`, and its arguments in console/arguments.py;
this file reads the command line and turns a result into text or JSON on stdout and an exit code:

    0   everything is fine
    1   the command ran and found something wrong: a fault, a site that fails, a wrong implementation
    2   the command could not run: one line on stderr says why (`--debug`: the traceback too)
    130 it was interrupted
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from npu_patch.commands.console import standard_output
from npu_patch.commands.console.arguments import add_arguments
from npu_patch.commands.console.result import CommandError, Result, named
from npu_patch.version import __version__

COMMANDS = {
    "doctor": "what is installed, what is used, what is wrong and what to do",
    "coverage": "what would be patched in a model family, or in all of them; needs no weights and no device",
    "verify": "on your device, each patched op and a whole model against float64, forward and gradients",
    "bench": "on your device, each patched op at a model's shapes and a LoRA step, patched against unpatched",
    "count": "on the simulated device, what a training step and a decoded token launch, copy and wait for",
    "quantize": "a copy of a model with int8 weights, which transformers, vLLM and sglang read; needs no device",
    "dequantize": "a plain copy of a model with int8 weights, to merge adapters into; needs no device",
    "run": "your script as it is, or a program or module, with apply() once transformers is imported",
    "tune": "on your device, the fastest right way for each op and shape, written to a file that apply() reads",
}
WRONG, REFUSED, INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; see above for the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _options(arguments)
    try:
        with standard_output.kept_for_the_answer() if options.json else contextlib.nullcontext():
            result = _run(options)
            text = standard_output.as_json(result.content) if options.json else _shown(result)
        standard_output.write(text)
    except KeyboardInterrupt:
        return _refused(options, "interrupted", INTERRUPTED)
    except CommandError as error:
        return _refused(options, str(error))
    except Exception as error:
        return _refused(options, f"{named(error)} (--debug shows where)")
    return 0 if result.fine else WRONG


def _run(options: argparse.Namespace) -> Result:
    if options.command != "doctor":
        _check_environment(options.command)
    if not getattr(options, "device", "npu").startswith("npu"):
        from npu_patch.commands.subject.families import without_broken_torch_npu

        without_broken_torch_npu()
    try:
        module = importlib.import_module(f"npu_patch.commands.{options.command}.command")
    except Exception as error:  # a broken torch_npu raises more than ImportError, out of `import torch`
        raise CommandError(
            f"{type(error).__name__}: {error}; python -m npu_patch doctor says what is wrong and what to do"
        ) from error
    return module.run(options)


def _check_environment(command: str) -> None:
    """What `apply()` would refuse in the middle of the work. `tune` itself says why it follows no tuning file."""
    from npu_patch.commands.tuning_file import content_of
    from npu_patch.switches import resolve

    try:
        switches = resolve()
        if switches.tune is not None and command != "tune":
            content_of(switches.tune)
    except ValueError as error:
        raise CommandError(str(error)) from error


def _shown(result: Result) -> str:
    from npu_patch.commands.console.terminal import drawn

    return drawn(result.shown())


def _refused(options: argparse.Namespace, message: str, code: int = REFUSED) -> int:
    """One line on stderr; called while the exception is handled, which `--debug` shows."""
    if options.debug and code == REFUSED:
        traceback.print_exc()
    message = " ".join(message.split())
    print(f"npu_patch {options.command}: {message}", file=sys.stderr)
    if options.json:
        with contextlib.suppress(CommandError):
            standard_output.write(standard_output.as_json({"error": message}))
    return code


class _BadUsage(Exception):
    pass


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise _BadUsage(message)


def _options(arguments: list[str]) -> argparse.Namespace:
    """
    Raises:
        SystemExit: for bad usage (2), and after `--help` and `--version` (0).
    """
    try:
        return _parser().parse_args(arguments)
    except _BadUsage as error:
        if "--json" in arguments:
            standard_output.write(standard_output.as_json({"error": str(error)}))
        raise SystemExit(REFUSED) from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m npu_patch",
        description="Fused kernels for Hugging Face models on Ascend NPUs: what they do here.",
        epilog="Exit codes: 0 fine, 1 something wrong was found, 2 the command could not run. To try a command without "
        "an NPU: python -m npu_patch.simulator -m npu_patch COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"npu_patch {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in COMMANDS.items():
        add_arguments(
            name, commands.add_parser(name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.")
        )
    return parser
