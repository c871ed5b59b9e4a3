"""What each command takes on its command line. Imports no torch: `--help` is answered where torch is broken."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from npu_patch.switches import SWITCHES

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(command: str, parser: argparse.ArgumentParser) -> None:
    """Those of one command, and those of every command."""
    OF_COMMANDS[command](parser)
    if command == "run":  # all that follows its script is the script's
        parser.set_defaults(json=False, debug=False)
        return
    parser.add_argument("--json", action="store_true", help="print JSON to stdout, and nothing else")
    parser.add_argument("--debug", action="store_true", help="show the traceback of what fails")


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--python", default=sys.executable, help="the interpreter to examine (default: this one)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that one probe may take (default 120)")


def _coverage(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "model", metavar="MODEL", nargs="?", help="a model type of transformers, such as qwen3_moe, or a model's folder"
    )
    which.add_argument("--all", action="store_true", help="every family of the installed transformers, as a matrix")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page too")


def _verify(parser: argparse.ArgumentParser) -> None:
    _model_and_device(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, action="append", help="may be given again (default: float32 and bfloat16)"
    )
    parser.add_argument("--seeds", type=int, help="models, or batches of a stored model (default 4)")
    against = parser.add_argument_group("what a quantised model lost")
    against.add_argument(
        "--against",
        metavar="ORIGINAL",
        help="the folder of the model that MODEL is a quantised copy of: logits, perplexity and layers are compared",
    )
    against.add_argument("--text", metavar="FILE", type=Path, help="to measure on (default: what Python comes with)")
    against.add_argument("--tokens", type=int, help="of the text (default 2048)")
    against.add_argument("--length", type=int, help="tokens at a time (default 512, or what the model has)")
    against.add_argument(
        "--max-logits-error", metavar="X", type=float, help="relative; beyond it the exit code is 1 (default 0.1)"
    )
    against.add_argument(
        "--max-perplexity-ratio", metavar="X", type=float, help="to the original's; likewise (default 1.03)"
    )


def _bench(parser: argparse.ArgumentParser) -> None:
    _model_and_device(parser)
    _sizes(parser)
    parser.add_argument("--png", metavar="FILE", type=Path, help="draw it too")


def _count(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a model type of transformers, such as qwen3_moe (a small random model is made), or a model's folder; "
        "config.json is enough",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--tokens", type=int, default=64, help="in the one sequence of the batch (default 64)")
    parser.add_argument("--real", action="store_true", help="the type's own sizes with a layer of each kind, not tiny")
    parser.add_argument(
        "--size", metavar="NAME=VALUE", nargs="+", action="extend", default=[], help="of the configuration, as JSON"
    )
    parser.add_argument("--packed", type=int, default=1, metavar="N", help="sequences that the tokens are packed of")
    parser.add_argument("--padding", type=int, default=0, metavar="N", help="of the tokens, at the left")
    parser.add_argument(
        "--images",
        type=int,
        default=0,
        metavar="N",
        help="drawn ones, for a tiny model with a tower, whose part is counted too",
    )
    parser.add_argument("--lora", action="store_true", help="adapters in float32 on the linear layers, the rest frozen")
    parser.add_argument("--attention", metavar="NAME", help="the attention implementation, such as sdpa")
    parser.add_argument("--experts", metavar="NAME", help="the experts implementation, such as eager or grouped_mm")
    parser.add_argument(
        "--triton", action=argparse.BooleanOptionalAction, help="Triton kernels in triton's interpreter (default: none)"
    )
    parser.add_argument(
        "--switch",
        metavar="NAME=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="of apply(), for the patched side: loss=0",
    )
    parser.add_argument("--rows", type=int, default=12, help="operators in each table (default 12)")
    parser.add_argument("--svg", metavar="FILE", type=Path, help="draw it too")


def _tune(parser: argparse.ArgumentParser) -> None:
    _model_and_device(parser)
    _sizes(parser)
    parser.add_argument("--lora", action="store_true", help="adapters on the linear layers, the rest frozen: them too")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        required=True,
        help="the file to write; what another call, or apply() for TWINKLE_NPU_TRITON=auto, measured there stays",
    )


def _dequantize(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(device="cpu")
    parser.add_argument(
        "model", metavar="MODEL", help="a model's folder with safetensors, or the name of one in the hub's cache"
    )
    parser.add_argument(
        "out", metavar="OUT", help="a new folder; or that of an interrupted call, which the same command goes on with"
    )


def _quantize(parser: argparse.ArgumentParser) -> None:
    _dequantize(parser)
    parser.add_argument(
        "--format",
        choices=("compressed-tensors", "ascend"),
        default="compressed-tensors",
        help="what says which weights are int8: config.json (the default), or msModelSlim's description",
    )
    parser.add_argument(
        "--ignore",
        metavar="REGEX",
        action="append",
        default=[],
        help="modules to leave alone too; matched from the start",
    )
    parser.add_argument(
        "--also", metavar="REGEX", action="append", default=[], help="modules to quantise that are left alone otherwise"
    )
    parser.add_argument(
        "--keep-packed",
        action="store_true",
        help="experts that are packed in one tensor keep its name, which others do not read (default: a matrix each)",
    )


def _run(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [--report FILE] [--no-rope ...] [-m] SCRIPT [ARGUMENTS ...]"
    parser.add_argument(
        "--report", metavar="FILE", help="write the report there at the end (.json, .html or text); - prints it"
    )
    for switch in SWITCHES:
        option = f"--{switch.name.replace('_', '-')}"
        if switch.kind == "path":
            parser.add_argument(option, metavar="FILE", help=switch.gates)
        else:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, help=switch.gates)
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script", metavar="SCRIPT", help="a file, a program such as torchrun, or a module after -m")
    parser.add_argument("args", metavar="ARGUMENTS", nargs=argparse.REMAINDER, help="those of the script")


def _model_and_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a model type of transformers, such as qwen3_moe (a small random model is made), or a model's folder",
    )
    parser.add_argument("--device", default="npu", help="npu, cuda or cpu, or one of several: npu:1 (default npu)")


def _sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--tokens",
        type=int,
        help="in the one sequence of the batch (default 4096 or what the model has; 64 where tiny)",
    )
    parser.add_argument("--samples", type=int, default=20, help="of each time (default 20)")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model, not one with the type's own sizes and a layer of each kind"
    )


OF_COMMANDS: Mapping[str, Callable[[argparse.ArgumentParser], None]] = {
    "doctor": _doctor,
    "coverage": _coverage,
    "verify": _verify,
    "bench": _bench,
    "count": _count,
    "tune": _tune,
    "quantize": _quantize,
    "dequantize": _dequantize,
    "run": _run,
}
