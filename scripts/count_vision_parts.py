"""What parts of vision towers cost either way, counted on the simulated NPU: launches and bytes moved.

    python -m npu_patch.simulator scripts/count_vision_parts.py
    python -m npu_patch.simulator scripts/count_vision_parts.py --classes

Patch embeddings as the convolution and as the product over patches; attention over heads as they are and padded. With a
backward of all inputs ("trained") and, as in a frozen tower, without. Padding of heads is counted in elements of the
inputs only: how many tiles the cube unit multiplies, no count says. The rules are those of
npu_patch/simulator/counters.py.

`--classes` says how many classes of the installed transformers make convolutions whose kernel is their stride, and how
many of those are served. They are found in the source, by arguments that are the same expression, and are made on the
meta device from default configurations; a few want other arguments.
"""

from __future__ import annotations

import argparse
import ast
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

from npu_patch import simulator

if not simulator.is_active():
    simulator.start()

import torch
import transformers
from torch import Tensor, nn

from npu_patch.ops.attention.call import Attention
from npu_patch.ops.attention.fusion import IMPLEMENTATION
from npu_patch.ops.attention.padding import PADDED
from npu_patch.ops.patch_embedding import PATCH_EMBEDDING, convolution
from npu_patch.probe.patch_embedding import Patches, read_patches, settings_of

DTYPE = torch.bfloat16
EMBEDDINGS = {  # shapes of input and weight
    "Qwen2.5-VL, 4096 patches": ((4096, 3, 2, 14, 14), (1280, 3, 2, 14, 14)),
    "SigLIP so400m, 4 images": ((4, 3, 378, 378), (1152, 3, 14, 14)),
    "VideoMAE, 2 videos": ((2, 3, 16, 224, 224), (768, 3, 2, 16, 16)),
}
HEADS = {"80, packed (Qwen2.5-VL)": (16, 80, (1024,) * 4), "72, dense (SigLIP so400m)": (16, 72, None)}
CONVOLUTIONS = {nn.Conv2d: nn.Conv2d.forward, nn.Conv3d: nn.Conv3d.forward}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", action="store_true", help="count classes of transformers instead")
    if parser.parse_args().classes:
        found = classes()
        total = len(found.served) + len(found.by_source) + len(found.others)
        print(f"transformers {transformers.__version__}: {total} classes, {len(found.served)} of them made and served")
        print(f"not made here, of torch's own class by their source: {', '.join(found.by_source) or 'none'}")
        print(f"not served: {'; '.join(map(': '.join, found.others.items())) or 'none'}")
        return
    print(f"{'':<72}{'forward':>20}{'trained':>20}\n{'':<72}" + f"{'launches':>10}{'MB':>10}" * 2)
    (product,) = PATCH_EMBEDDING.implementations
    for name, (x, weight) in EMBEDDINGS.items():
        for way, function in (("convolution", convolution), ("product", product.run)):
            row(f"{name}: {way}", lambda *given, function=function: function(*given, None), x, weight)
    for name, (heads, width, lengths) in HEADS.items():
        shape = (4, heads, 1024, width) if lengths is None else (sum(lengths), heads, width)
        ends = None if lengths is None else tuple(sum(lengths[: index + 1]) for index in range(len(lengths)))
        attention = Attention(width**-0.5, ends=None if ends is None else (ends, ends))
        for each in (IMPLEMENTATION, *PADDED):
            way = each.name.removeprefix(f"{IMPLEMENTATION.name}, ")
            row(f"{name}: {way}", lambda *given, run=each.run, of=attention: run(*given, of), *[shape] * 3)


def row(name: str, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
    given = [torch.randn(shape, dtype=DTYPE, device="npu", requires_grad=True) for shape in shapes]
    if len(shapes) == 3 and len(shapes[0]) == 4:  # heads of projections
        given = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in given]
    with simulator.count() as forward:
        out = function(*given)
    gradient = torch.randn(out.shape, dtype=DTYPE, device="npu")
    with simulator.count() as backward:
        torch.autograd.grad(out, given, gradient)
    both = forward.launches + backward.launches, forward.bytes + backward.bytes
    cells = "".join(
        f"{launches:>10}{moved / 1e6:>10.1f}" for launches, moved in ((forward.launches, forward.bytes), both)
    )
    print(f"{name:<72}{cells}")


@dataclass
class Classes:
    """Of transformers, with convolutions whose kernel is their stride. `by_source`: that could not be made here."""

    served: list[str] = field(default_factory=list)
    by_source: list[str] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)


def classes(families: str = "*") -> Classes:
    """`families`: of their names, as in a shell."""
    found = Classes()
    for module, name in _with_patches(families):
        readings = [_read(each) for each in _convolutions(module, getattr(module, name))]
        reasons = [each.reason for each in readings if not isinstance(each, Patches)]
        if reasons:
            found.others[name] = reasons[0]
        else:
            (found.served if readings else found.by_source).append(name)
    return found


def _with_patches(families: str) -> Iterator[tuple[ModuleType, str]]:
    for file in sorted((Path(transformers.__file__).parent / "models").glob(f"{families}/modeling_*.py")):
        names = [name for name, calls in convolutions_of_patches(file).items() if calls]
        if names:
            module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
            yield from ((module, name) for name in names)


def convolutions_of_patches(file: Path) -> dict[str, list[ast.Call]]:
    """By class, in its source."""
    source = file.read_text(encoding="utf-8")
    if "nn.Conv" not in source:
        return {}
    found = [each for each in ast.parse(source).body if isinstance(each, ast.ClassDef)]
    return {each.name: list(filter(_is_of_patches, ast.walk(each))) for each in found}


def _is_of_patches(node: ast.AST) -> TypeGuard[ast.Call]:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    if node.func.attr not in ("Conv2d", "Conv3d"):
        return False
    given = dict(zip(("in", "out", "kernel_size", "stride"), map(ast.unparse, node.args), strict=False))
    given |= {each.arg: ast.unparse(each.value) for each in node.keywords if each.arg}
    return given.get("kernel_size") == given.get("stride", "1") != "1"


def _convolutions(module: ModuleType, cls: type) -> list[nn.Module]:
    """Of an instance from the first configuration of its module that it takes."""
    kinds = [each for each in vars(module).values() if isinstance(each, type)]
    configurations: list[Any] = []
    for kind in kinds:
        if issubclass(kind, transformers.PreTrainedConfig) and kind is not transformers.PreTrainedConfig:
            try:
                configurations.append(kind())
            except Exception:  # one that has no defaults
                continue
    within = [value for each in configurations for value in vars(each).values()]
    configurations += [each for each in within if isinstance(each, transformers.PreTrainedConfig)]
    for given in (*((each,) for each in configurations), ()):
        try:
            with torch.device("meta"):
                layer = cls(*given)
        except Exception:  # another layer's configuration
            continue
        convolutions = [each for each in layer.modules() if isinstance(each, tuple(CONVOLUTIONS))]
        found = [each for each in convolutions if each.kernel_size == each.stride and max(each.kernel_size) > 1]
        if found:
            return found
    return []


def _read(layer: nn.Module) -> Any:
    original = next(forward for cls, forward in CONVOLUTIONS.items() if isinstance(layer, cls))
    return read_patches(type(layer), original, settings_of(vars(layer)))


if __name__ == "__main__":
    main()
