"""python -m npu_patch COMMAND ...: see npu_patch/commands."""

import sys

from npu_patch.commands import main
from npu_patch.commands.console import standard_output
from npu_patch.commands.run.command import ProgramEnded

if __name__ == "__main__":
    code: str | int | None
    try:
        code = main(sys.argv[1:])
    except ProgramEnded:
        raise
    except SystemExit as stopped:  # --help, --version, bad usage
        code = stopped.code
    standard_output.close()
    sys.exit(code)
