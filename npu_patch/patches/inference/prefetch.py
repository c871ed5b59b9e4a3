"""The weights that follow an attention layer are fetched into the L2 cache while it attends to a single token. Opt-in.

Changes    nothing of the model: our function in AttentionInterface is told which layers follow each attention layer.
Not when   its attention is none of ours; gradients are recorded; there are several tokens of a sequence, or many
           sequences. Experts are not fetched: which ones come next, the host does not know.
Delete     when products read ahead by themselves.

No hooks, which would have other patches call the original: who listens, hears (law 14).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn import Linear, Module

from npu_patch.ops import prefetch
from npu_patch.patches.attention.patch import ATTENDING, layers_asking
from npu_patch.patches.preparation import Change, Preparation
from npu_patch.switches import Switches

AHEAD = 2  # products: attention's own last, and the first of what follows


def why_not(model: Module, device_type: str, switches: Switches) -> str | None:
    if device_type != "npu":
        return f"{device_type} has no such operator"
    if not switches["sdpa"]:
        return "attention is left as it is, beside which it would run"
    missing = prefetch.OPERATOR.missing()
    if missing is not None:
        return missing
    if not any(True for _ in _followed(model)):
        return f"no layer asks for attention by {' or '.join(ATTENDING)} before a linear one on the device"
    return None


def prepare(model: Module, device_type: str, switches: Switches) -> Iterator[Change]:
    for layer, following in _followed(model):
        prefetch.FOLLOWING[layer] = following
        yield layer, _change_back


def _change_back(layer: Module) -> None:
    prefetch.FOLLOWING.pop(layer, None)


def _followed(model: Module) -> Iterator[tuple[Module, tuple[Linear, ...]]]:
    """Each attention layer with the products that come next, in the order in which layers were made."""
    around = {id(child): parent for parent in model.modules() for child in parent.children()}
    for layer in layers_asking(model):
        own = list(_products(layer))
        parent = around.get(id(layer))
        beside = [] if parent is None else list(_products(parent))
        following = [*own[-1:], *(beside[beside.index(own[-1]) + 1 :] if own and own[-1] in beside else [])]
        on_device = tuple(each for each in following[:AHEAD] if each.weight.device.type == "npu")
        if on_device:
            yield layer, on_device


def _products(module: Module) -> Iterator[Linear]:
    """Linear layers within; of an adapted one, the layer that the adapter is for."""
    for child in module.children():
        base = child._modules.get("base_layer", child)
        if isinstance(base, Linear):
            yield base
        else:
            yield from _products(child)


PREPARATION = Preparation("prefetch", "prefetch", why_not, prepare)
