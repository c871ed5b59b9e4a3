"""The catalogue: its order follows from what each patch needs, and nobody else knows a patch by its name."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest

import npu_patch
from npu_patch.patches import CATALOGUE
from npu_patch.patches.order import in_order
from npu_patch.patches.patch import Patch


def patches(needs: Mapping[str, tuple[str, ...]]) -> list[Patch]:
    return [Patch(name, "fused_ops", None, lambda module: (), None, None, needs=each) for name, each in needs.items()]


def names(found: tuple[Patch, ...]) -> str:
    return " ".join(patch.name for patch in found)


@pytest.mark.parametrize("given", list(itertools.permutations(range(4))))
def test_a_patch_comes_after_those_that_it_needs_wherever_it_is_listed(given: tuple[int, ...]) -> None:
    every = patches({"norm": (), "rotation": (), "both": ("norm", "rotation"), "more": ("both",)})
    order = names(in_order([every[index] for index in given])).split()
    assert order.index("more") > order.index("both") > max(order.index("norm"), order.index("rotation"))


def test_patches_that_need_nothing_stay_as_they_are_listed() -> None:
    assert names(in_order(patches({"c": (), "late": ("b",), "a": (), "b": ()}))) == "c a b late"


@pytest.mark.parametrize(
    "needs, words",
    [
        ({"norm": (), "both": ("norm", "rotation")}, "patch 'both' needs 'rotation'; there are norm, both"),
        ({"one": ("other",), "other": ("one",), "free": ()}, "wait for each other: one, other"),
        ({"own": ("own",)}, "wait for each other: own"),
    ],
)
def test_an_order_that_cannot_be_is_an_error_that_names_the_patches(
    needs: Mapping[str, tuple[str, ...]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        in_order(patches(needs))


def test_two_patches_of_one_name_are_an_error() -> None:
    with pytest.raises(ValueError, match="two patches are called 'twice'"):
        in_order([*patches({"twice": ()}), *patches({"twice": ()})])


def test_the_catalogue_is_in_the_order_of_its_needs() -> None:
    assert in_order(reversed(CATALOGUE)) != CATALOGUE == in_order(CATALOGUE)
    needs = {patch.name: set(patch.needs) for patch in CATALOGUE if patch.needs}
    assert needs == {
        "qk_norm_rope": {"rms_norm", "rope"},
        "add_rms_norm": {"rms_norm"},
        "w8a8_norm": {"rms_norm", "w8a8"},
        "vision_attention": {"attention"},
        "mtp": {"gated_delta_net"},
    }


PARTS_OF_MODELS = ("count", "quantize", "quality")


@pytest.mark.parametrize("room", ["applying", "commands", "sites", "measuring", "reporting"])
def test_who_uses_patches_knows_none_by_its_name(room: str) -> None:
    """Nor the values that wait between them: what is to be known of a patch is a field of it or of its replacements.
    (The doctor says in words what calls an operator; it imports nothing that it examines. Parts of models have
    some of their names, as the options of `count` and the weights of a checkpoint.)"""
    known = {patch.name for patch in CATALOGUE}
    modules = {f"npu_patch.patches.{name}" for name in ("attention", "experts", "gated_delta", *known)}
    modules |= {f"npu_patch.waiting.{name}" for name in ("masks", "sums")}
    files = [each for each in (Path(npu_patch.__file__).parent / room).rglob("*.py") if each.parent.name != "doctor"]
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Constant) and node.value in known and file.parent.name not in PARTS_OF_MODELS
            imported = isinstance(node, ast.ImportFrom) and node.module is not None
            if named or (imported and any(f"{node.module}.".startswith(f"{each}.") for each in modules)):
                found.append(f"{file.name}:{node.lineno}")
    assert files and found == []
