"""How transformers loads W8A8 checkpoints by way of npu_patch: its quantizer for them. A class of transformers' own
kind, so the module is imported as the first such checkpoint is loaded, or a model of one unpickled."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Parameter
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from npu_patch.checkpoints.folder import Checkpoint
from npu_patch.checkpoints.safetensors_file import BadCheckpoint, header_of
from npu_patch.checkpoints.w8a8 import ASCEND, OFFSET, SCALE, W8A8, config_of, w8a8_in
from npu_patch.ops.readings import NotRead
from npu_patch.ops.w8a8.experts import REGISTERED
from npu_patch.ops.w8a8.layer import W8A8Linear
from npu_patch.patches.experts.patch import READINGS, asks_registry
from npu_patch.patches.w8a8 import experts
from npu_patch.patches.w8a8.plan import Int8Parameter, Names, check_offsets, check_scales, planned

WEIGHT = "weight"
experts.register()


class W8A8Config(QuantizationConfigMixin):
    """`content`: what compressed-tensors says of such a checkpoint in config.json, which is what is saved."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.quant_method = QuantizationMethod.COMPRESSED_TENSORS
        self.content = dict(content)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.content)


class W8A8Quantizer(HfQuantizer):
    """`described_by`: who describes the checkpoint, by its name in npu_patch/checkpoints/w8a8.py."""

    requires_calibration = True
    quantization_config: W8A8Config
    serialized_names: dict[str, list[str]] = {WEIGHT: [WEIGHT, WEIGHT + SCALE]}  # noqa: RUF012 (so is the base's)
    is_trainable = True  # adapters on top; the weights themselves are frozen

    def __init__(self, content: Mapping[str, Any] | None, described_by: str) -> None:
        super().__init__(W8A8Config(config_of([]) if content is None else content), pre_quantized=True)
        self.described_by = described_by
        self._waiting: tuple[Checkpoint, W8A8] | None = None
        self._parameters: Sequence[Int8Parameter] = ()

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise NotImplementedError("int8 checkpoints are loaded as a whole on each rank, without distributed_config")
        checkpoint = self._checkpoint(checkpoint_files)
        w8a8 = w8a8_in(checkpoint)
        if w8a8 is None:
            raise BadCheckpoint(f"{checkpoint.folder} has lost its description")
        if self.described_by == ASCEND:
            matrices = [each.name for each in checkpoint.tensors.values() if len(each.shape) == 2]
            left = [name.removesuffix(f".{WEIGHT}") for name in matrices if name.endswith(f".{WEIGHT}")]
            left = [name for name in left if f"{name}.{WEIGHT}" not in w8a8.weights]
            self.quantization_config.content["ignore"] = sorted(left)
        check_offsets(checkpoint, w8a8)
        self._waiting = checkpoint, w8a8

    def _checkpoint(self, files: Sequence[str] | None) -> Checkpoint:
        if not files or not all(str(file).endswith(".safetensors") for file in files):
            raise BadCheckpoint(f"int8 weights are loaded from files in safetensors, not from {files or 'memory'}")
        config = {} if self.described_by == ASCEND else {"quantization_config": self.quantization_config.content}
        shards = {Path(file).name: header_of(Path(file)) for file in files}
        return Checkpoint(Path(files[0]).parent, config, shards)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Only here are all renamings known, the user's included; nothing is loaded yet."""
        if self._waiting is None:
            return super().update_weight_conversions(weight_conversions, model)
        (checkpoint, w8a8), self._waiting = self._waiting, None
        parameters = planned(model, checkpoint, w8a8, Names.of(model, weight_conversions))
        prepare(model, parameters)
        updated = super().update_weight_conversions(weight_conversions, model)
        check_scales(w8a8, Names.of(model, updated))
        if any(name.endswith(OFFSET) for name in checkpoint.tensors):
            ignored = model._keys_to_ignore_on_load_unexpected or ()
            model._keys_to_ignore_on_load_unexpected = {*ignored, rf"\.{WEIGHT}{OFFSET}$"}
        self._parameters = parameters
        return updated

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for each in self._parameters:
            module, name = _owner(model, each.name)
            weight, scale = getattr(module, name), getattr(module, name + SCALE)
            if weight.dtype != torch.int8:
                raise BadCheckpoint(f"{each.name} was loaded as {weight.dtype}, not as int8")
            weight.requires_grad_(False)
            scale.requires_grad_(False)
            if scale.dim() == 1:
                setattr(module, name + SCALE, Parameter(scale.data[:, None], requires_grad=False))
        self._parameters = ()
        return model


def prepare(model: Any, parameters: Sequence[Int8Parameter]) -> None:
    """Layers without storage that take the int8 parameters.

    Raises:
        BadCheckpoint: for a layer that does not compute with such.
    """
    packed: dict[str, list[Int8Parameter]] = {}
    for each in parameters:
        module, name = _owner(model, each.name)
        if name == WEIGHT and type(module).forward is Linear.forward:
            if each.name in model.all_tied_weights_keys:
                raise BadCheckpoint(f"{each.name} is int8, and tied to {model.all_tied_weights_keys[each.name]}")
            model.set_submodule(each.name.removesuffix(f".{WEIGHT}"), _linear(module, each))
        else:
            packed.setdefault(each.name.rpartition(".")[0], []).append(each)
    for path, own in packed.items():
        _prepare_experts(model.get_submodule(path), own)


def _linear(module: Linear, parameter: Int8Parameter) -> W8A8Linear:
    weight = module.weight
    made = W8A8Linear(module.in_features, module.out_features, False, "meta", weight.dtype)
    made.weight = _empty(weight.shape, torch.int8)
    made.weight_scale = _scale(parameter, weight)
    made.bias = module.bias
    return made.train(module.training)


def _prepare_experts(module: Any, parameters: Sequence[Int8Parameter]) -> None:
    named, first = type(module).__name__, parameters[0].name
    if not asks_registry(module):
        raise BadCheckpoint(f"{first} is int8, and {named} is no layer that computes with int8 weights")
    reading = READINGS.of(module)
    why = reading.reason if isinstance(reading, NotRead) else experts.why_not(module, reading)
    if isinstance(reading, NotRead) or why is not None:
        raise BadCheckpoint(f"{first} is int8, and {named} computes what int8 experts do not: {why}")
    names = experts.names_of(reading)
    if {each.name.rpartition(".")[2] for each in parameters} != set(names):
        raise BadCheckpoint(f"{first} is int8, and of {named}'s {' and '.join(names)} the other is not")
    for each in parameters:
        name = each.name.rpartition(".")[2]
        weight = getattr(module, name)
        experts_count, *sides = weight.shape
        sides[1 if reading.convention.transposed else 0] = 1
        if each.scale != (experts_count, *sides):
            raise BadCheckpoint(f"{each.name}{SCALE} is {list(each.scale)}, not {[experts_count, *sides]}")
        module.register_parameter(name + SCALE, _scale(each, weight))
        setattr(module, name, _empty(weight.shape, torch.int8))
    module.config._experts_implementation = REGISTERED


def _scale(parameter: Int8Parameter, weight: Tensor) -> Parameter:
    """In the dtype of the model; in float32 where the checkpoint has it so, and for float16, as npu_quant_matmul
    wants it."""
    wide = parameter.wide or weight.dtype == torch.float16
    return _empty(parameter.scale, torch.float32 if wide else weight.dtype)


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Parameter:
    """What transformers never fills at random. Offloaded to a disk it has no storage after loading either."""
    made = Parameter(torch.empty(tuple(shape), dtype=dtype, device="meta"), requires_grad=False)
    made._is_hf_initialized = True  # type: ignore[attr-defined]
    return made


def _owner(model: torch.nn.Module, parameter: str) -> tuple[Any, str]:
    path, _, name = parameter.rpartition(".")
    return model.get_submodule(path), name
