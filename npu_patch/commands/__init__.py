"""python -m npu_patch: what an installation, a model family or a device gives, asked from a terminal.

Each command has a module with `NAME`, `HELP`, `add_arguments(parser)` and `run(options) -> Result`; this one reads the
command line and turns a result into text or JSON on stdout and an exit code:

    0   everything is fine
    1   the command ran and found something wrong: a fault, a site that fails, a wrong implementation
    2   the command line or the machine does not allow it to run: a message on stderr says what is accepted
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
from collections.abc import Sequence

from npu_patch.commands.result import CommandError, Result

COMMANDS = {
    "doctor": "what is installed, what is used, what is wrong and what to do",
    "coverage": "what would be patched in a model family, or in all of them; needs no weights and no device",
    "verify": "on your device, each patched op and a whole model against float64, forward and gradients",
    "bench": "on your device, each patched op at a model's shapes and a LoRA step, patched against unpatched",
    "tune": "on your device, the fastest right way for each op and shape, written to a file that apply() reads",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; see above for the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    chosen = next((each for each in arguments if not each.startswith("-")), None)
    options = _parser(chosen).parse_args(arguments)
    module = importlib.import_module(f"npu_patch.commands.{options.command}")
    try:
        # What libraries print while it runs is no part of the JSON.
        with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
            result: Result = module.run(options)
        if options.json:
            print(json.dumps(result.content, indent=2))
        else:
            from npu_patch.commands.terminal import show

            show(result.shown())
    except CommandError as error:
        print(f"npu_patch {options.command}: {error}", file=sys.stderr)
        return 2
    return 0 if result.fine else 1


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m npu_patch",
        description="Fused kernels for Hugging Face models on Ascend NPUs: what they do here.",
        epilog="Exit codes: 0 fine, 1 something wrong was found, 2 the command could not run. To try a command without "
        "an NPU: python -m npu_patch.simulator -m npu_patch COMMAND ...",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.")
        if name == chosen:  # a command may need torch; doctor must not
            importlib.import_module(f"npu_patch.commands.{name}").add_arguments(command)
        command.add_argument("--json", action="store_true", help="print JSON to stdout, and nothing else")
    return parser
