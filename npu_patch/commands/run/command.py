"""run: a script, program or module as it is, with `apply()` once transformers is there.

Imports no torch: the script may set what torch reads when it is imported.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from npu_patch.autoload.door import open_door
from npu_patch.autoload.entry import why_no_entry_here
from npu_patch.commands.console.output_file import output_file
from npu_patch.commands.console.result import CommandError
from npu_patch.simulator.program import NoProgram, found, run_module, run_script
from npu_patch.switches import SWITCHES, set_for_children, unasked

PRINTED = "-"
INTERRUPTED = 130


class ProgramEnded(SystemExit):
    """What ran has ended; its exit code, and what it still prints, are its own."""


def run(options: argparse.Namespace) -> NoReturn:
    """
    Raises:
        CommandError: where it is not started.
        ProgramEnded: where it was.
    """
    try:
        script = options.script if options.module else found(options.script)
    except NoProgram as error:
        raise CommandError(str(error)) from error
    given = {switch.name: getattr(options, switch.name) for switch in SWITCHES}
    values = {name: value for name, value in given.items() if value is not None}
    set_for_children(values, _report(options.report))
    closed = why_no_entry_here()
    if closed is not None:
        print(f"npu_patch run: processes that it starts are not patched: {closed}", file=sys.stderr)
    open_door(unasked())
    try:
        (run_module if options.module else run_script)(script, options.args)
    except SystemExit as ended:
        raise ProgramEnded(ended.code) from None
    except (Exception, KeyboardInterrupt) as error:
        sys.excepthook(*sys.exc_info())  # as it would be shown without us: programs bring their own
        raise ProgramEnded(INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1) from None
    raise ProgramEnded(0)


def _report(file: str | None) -> str | None:
    return file if file in (None, PRINTED) else str(output_file("--report", Path(file)).resolve())
