"""python -m npu_patch.simulator [options] script.py ARGS... runs a script with a simulated npu:0."""

import argparse
import sys

from . import start
from .errors import SimulatorError
from .program import NoProgram, found, run_module, run_script


def main(arguments: list[str]) -> int:
    """Run the script or module; the exit code is the script's own, or 2 if the simulator cannot start."""
    parser = argparse.ArgumentParser(
        prog="python -m npu_patch.simulator",
        description="Run a Python script with a simulated Ascend NPU (npu:0) on this machine's memory.",
    )
    parser.add_argument("--devices", type=int, help="how many NPUs to simulate (default: one a rank, or 1)")
    parser.add_argument("--any-version", action="store_true", help="accept a torch_npu that was not tested")
    parser.add_argument("--replace-real", action="store_true", help="simulate even where a real CANN or NPU is present")
    parser.add_argument("--poison", action="store_true", default=None, help="device memory that nobody wrote is NaN")
    parser.add_argument(
        "--no-children", action="store_true", help="do not simulate in processes that the script starts"
    )
    parser.add_argument("-m", dest="module", action="store_true", help="run a module instead of a file")
    parser.add_argument("script", help="script file, program such as torchrun, or module name after -m")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="arguments of the script")
    options = parser.parse_args(arguments)

    try:
        script = options.script if options.module else found(options.script)
        start(
            devices=options.devices,
            any_version=options.any_version,
            replace_real=options.replace_real,
            poison=options.poison,
            children=not options.no_children,
        )
    except (SimulatorError, NoProgram) as error:
        return _fail(str(error))

    run = run_module if options.module else run_script
    run(script, options.args)
    return 0


def _fail(message: str) -> int:
    print(f"npu_patch.simulator: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
