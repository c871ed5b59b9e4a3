"""Frozen weights of linear layers and experts in FRACTAL_NZ, so that no product lays them out anew. Opt-in.

Changes    `data` of parameters, which stay the objects that they are, with their shapes, strides and values.
Not when   a weight is trained, shared, a part of a larger storage, a subclass of Parameter, hooked, neither in half
           precision nor an int8 layer's, on another device, of widths that would be padded (which costs memory), of
           output embeddings (a loss reads them by rows), or read by the code of a layer around; the model is sharded,
           or its ranks have yet to be given one another's weights. The device is asked whether such products are right.
Put back   before a `state_dict`, a copy, a pickle, a move or cast of its module, peft's merges, a step of an optimizer
           that trains it: for good, which is said once, except where a move changes nothing. Experts too where a call
           falls through.
Delete     when torch_npu keeps weights so and gives everybody else plain ones.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter
from torch.optim import optimizer as torch_optimizer

from npu_patch import log
from npu_patch.ops import weight_format
from npu_patch.ops.w8a8.layer import W8A8Linear
from npu_patch.ops.w8a8.npu import WIDEST
from npu_patch.patches.experts.patch import registered_reading
from npu_patch.patches.preparation import Change, LeftAlone, Preparation, Rebinding
from npu_patch.sites.names_used import names_used
from npu_patch.switches import Switches

BEFORE_STEP = torch_optimizer._global_optimizer_pre_hooks
# Methods of a layer, before which its weights are put back; and of one of peft's, before which its base layer's are.
OF_A_LAYER = ("_save_to_state_dict", "__reduce_ex__")
MOVES = "_apply"  # `to` and the like, most of which change nothing: a trainer puts a model where it is
OF_AN_ADAPTER = ("merge", "unmerge")
BASE = "base_layer"
SHARDING = ("FullyShardedDataParallel", "DeepSpeedEngine")
LIBRARIES = ("torch.", "transformers.modeling_utils", "peft.")  # whose code reads weights of any layer
PLAIN_AGAIN = "which is plain again, others maybe too; after npu_patch.restore(), apply() lays them out anew"
Weight = tuple[Module, str, str]  # its layer, its name, the function that takes it


def why_not(model: Module, device_type: str, switches: Switches) -> str | None:
    if device_type != "npu":
        return f"{device_type} has no such layout"
    sharded = next((type(each).__name__ for each in model.modules() if type(each).__name__ in SHARDING), None)
    if sharded is not None:
        return f"{sharded} keeps its weights"
    if _waits_for_other_ranks(model):
        return "its ranks have yet to be given one another's weights: wrap it first"
    found = list(_weights(model, switches))
    if not found:
        return "it has no linear layers"
    left = _left(model, found)
    if len(left) == len(found):
        return _in_words(left.values())
    fitting = [weight for at, weight in enumerate(found) if at not in left]
    asked = {((weight := getattr(layer, name)).device, weight.dtype, of) for layer, name, of in fitting}
    return next(filter(None, (weight_format.why_not(*each) for each in asked)), None)


def prepare(model: Module, device_type: str, switches: Switches) -> Iterator[Change | Rebinding | LeftAlone]:
    found = list(_weights(model, switches))
    left = _left(model, found)
    if weight_format.COMPILE_MODE.switch_off():
        yield weight_format.COMPILE_MODE, lambda mode: mode.switch_on()
    for at, (layer, name, _) in enumerate(found):
        if at not in left:
            weight_format.lay_out(layer, (name,))
            yield layer, _change_back
            yield from (_door(type(layer), method) for method in OF_A_LAYER)
            yield _door_of_moves(type(layer))
    for adapted in model.modules():
        if adapted._modules.get(BASE) in weight_format.HELD:
            yield from (_door(type(adapted), method) for method in OF_AN_ADAPTER if hasattr(type(adapted), method))
    yield Rebinding(BEFORE_STEP, __name__, _before_step)
    if left:
        yield LeftAlone(_in_words(left.values()))


def _change_back(layer: Module) -> None:
    weight_format.plain(layer)


def _weights(model: Module, switches: Switches) -> Iterator[Weight]:
    for layer in model.modules():
        if type(layer) is W8A8Linear and switches["w8a8"]:
            yield layer, "weight", weight_format.OF_INT8
        elif isinstance(layer, Linear):
            yield layer, "weight", weight_format.OF_LINEAR
        reading = registered_reading(layer) if switches["moe_patch"] else None
        if reading is not None:
            for name in (reading.convention.up_name, "down_proj"):
                yield layer, name, weight_format.OF_EXPERTS


def _left(model: Module, found: Iterable[Weight]) -> dict[int, str]:
    """Of those weights that are left alone, by their place, why."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    owners = Counter(each.untyped_storage()._cdata for _, each in tensors if each.device.type != "meta")
    heads = {id(head) for each in model.modules() if (head := _head_of(each)) is not None}
    named = {id(layer): name.rpartition(".")[2] for name, layer in model.named_modules()}
    read = {frozenset(names) for each in {type(each) for each in model.modules()} for names in _reading_weights(each)}
    left: dict[int, str] = {}
    for at, (layer, name, of) in enumerate(found):
        why = _why_left(layer, name, owners, of == weight_format.OF_INT8)
        if id(layer) in heads:
            why = "of output embeddings"
        elif why is None and isinstance(layer, Linear) and any(named[id(layer)] in names for names in read):
            why = "read by the code of a layer around"
        if why is not None:
            left[at] = why
    return left


def _why_left(layer: Module, name: str, owners: Counter[int], int8: bool) -> str | None:
    weight = layer._parameters.get(name)
    if isinstance(layer, Linear) and type(layer) is not Linear and not int8:
        return f"of a {type(layer).__name__}"
    if "forward" in vars(layer) or layer._forward_pre_hooks or layer._forward_hooks or hasattr(layer, "_hf_hook"):
        return "of a layer with hooks or a forward of its own"
    if weight is None or type(weight) is not Parameter or hasattr(weight, "ds_id"):
        return "no plain parameter"
    fits = weight.dtype == torch.int8 if int8 else weight.dtype in weight_format.DTYPES
    if not fits or (hasattr(layer, f"{name}_scale") and not int8):
        return f"in {str(weight.dtype).removeprefix('torch.')}"
    if weight.device.type != "npu":
        return f"on {weight.device.type}"
    if weight.requires_grad:
        return "trained"
    if weight._backward_hooks:
        return "hooked"
    storage = weight.untyped_storage()
    if owners[storage._cdata] != 1:
        return "shared"
    if not weight.is_contiguous() or storage.nbytes() != weight.numel() * weight.element_size():
        # What already lies in blocks too: its storage is padded, or it is another model's.
        return "a part of a larger storage"
    if weight_format.lies_in_blocks(weight):
        return "in blocks already"
    return _why_no_blocks(weight, int8)


def _why_no_blocks(weight: Tensor, int8: bool) -> str | None:
    blocks = weight_format.INT8_BLOCK if int8 else (weight_format.BLOCK, weight_format.BLOCK)
    widths = weight.shape[-2:]
    said = " and ".join(map(str, widths))
    if any(width % block for width, block in zip(widths, blocks, strict=True)):
        return f"of widths {said}, no multiples of {' and '.join(map(str, dict.fromkeys(blocks)))}"
    return f"of widths {said}, wider than {WIDEST}" if int8 and max(widths) > WIDEST else None


def _head_of(module: Module) -> Any:
    get = getattr(module, "get_output_embeddings", None)
    if not callable(get):
        return None
    try:
        return get()
    except (AttributeError, NotImplementedError):  # a part without a head
        return None


def _reading_weights(cls: type) -> Iterator[set[str]]:
    """The names in each function of a class that reads an attribute called weight."""
    for base in cls.__mro__:
        if not f"{base.__module__}.".startswith(LIBRARIES):
            for function in vars(base).values():
                names = names_used(function)
                if "weight" in names:
                    yield names


def _waits_for_other_ranks(model: Module) -> bool:
    """DistributedDataParallel sends every weight to all ranks, as memory, when it is made around a model."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    alone = torch.distributed.get_world_size() == 1
    return not alone and type(model).__name__ != "DistributedDataParallel"


def _in_words(reasons: Iterable[str]) -> str:
    return "left as they are: " + ", ".join(f"{count} {why}" for why, count in Counter(reasons).most_common())


def _door(cls: type, method: str) -> Rebinding:
    original: Callable[..., Any] = getattr(cls, method)

    @functools.wraps(original)
    def plain_first(self: Module, *args: Any, **kwargs: Any) -> Any:
        _put_back(self, method)
        return original(self, *args, **kwargs)

    return Rebinding(cls, method, plain_first)


def _door_of_moves(cls: type) -> Rebinding:
    """Laid out anew where a weight is still what it was, where it was."""
    original: Callable[..., Any] = getattr(cls, MOVES)

    @functools.wraps(original)
    def plain_meanwhile(self: Module, *args: Any, **kwargs: Any) -> Any:
        names = weight_format.HELD.get(self, ())
        if not weight_format.plain(self):
            return original(self, *args, **kwargs)
        before = {name: _kind(self._parameters.get(name)) for name in names}
        result = original(self, *args, **kwargs)
        for name, kind in before.items():
            if kind is not None and _kind(self._parameters.get(name)) == kind:
                weight_format.lay_out(self, (name,))
            else:
                log.warning(f"weight_nz: {MOVES} changed a weight, {PLAIN_AGAIN}")
        return result

    return Rebinding(cls, MOVES, plain_meanwhile)


def _kind(weight: Any) -> tuple[Any, ...] | None:
    if type(weight) is not Parameter or weight.requires_grad:
        return None
    return weight.dtype, weight.device, weight.shape, weight.data_ptr()


def _put_back(layer: Module, for_whom: str) -> None:
    for each in (layer, layer._modules.get(BASE)):
        if each is not None and weight_format.plain(each):
            log.warning(f"weight_nz: {for_whom} asked for a weight, {PLAIN_AGAIN}")


def _before_step(*_: Any) -> None:
    """An optimizer changes what it trains in place."""
    for layer, names in list(weight_format.HELD.items()):
        weights = (layer._parameters.get(name) for name in names)
        if any(weight is not None and weight.requires_grad for weight in weights):
            _put_back(layer, "a step of an optimizer")


PREPARATION = Preparation("weight_nz", "weight_nz", why_not, prepare)
