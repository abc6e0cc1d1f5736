"""Quantised weights of other libraries: their float values, and their integers if a program can store them.

Libraries store a quantised weight in tensor or layer classes of their own, with their own kernels. An emitted program
has none of these: it is captured from a copy whose weights are plain parameters, and the copy records the integers. The
libraries are not imported; their classes are recognised by names and attributes.
"""

import importlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorac.argument_types import Fields
from lorac.errors import CaptureError
from lorac.frontend.copying import copy_layer
from lorac.frontend.host import Host

_ORIGINS = "_lorac_quantised_origins"
"""Attribute of a copy's module that maps the names of its quantised weights to their ``QuantisedOrigin``."""
_LINEAR_8_BIT, _LINEAR_4_BIT = "Linear8bitLt", "Linear4bit"
"""Layers of bitsandbytes."""
_INPUT_ROUNDING, _INPUT_SCALE = ("act_quant_kwargs", "activation_quantization"), "act_pre_scale"
"""Attributes of torchao's tensors: how products quantise their inputs, and the scale of inputs."""
_ABSMAX_8_BIT = 127
"""The integer for the largest value of a row in bitsandbytes' 8-bit format."""
NF4 = "nf4"
QUANTISATION_LEVELS = {
    NF4: (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    )
}
"""Name -> the values of 4-bit integers. NF4 has the quantiles of a normal distribution ("QLoRA: Efficient Finetuning of
Quantized LLMs", Dettmers et al. 2023, arXiv 2305.14314)."""


class LayerWeight(Tensor):
    """The weight (out, in) of a bitsandbytes layer: the layer computes products; all other ops read float values.

    Args:
        layer: the layer; its weight alone has neither sizes nor values.
    """

    @staticmethod
    def __new__(cls, layer: nn.Linear) -> "LayerWeight":
        sizes = (layer.out_features, layer.in_features)
        weight: Any = layer.weight
        dtype = getattr(getattr(weight, "quant_state", None), "dtype", torch.float32)
        made: LayerWeight = Tensor._make_wrapper_subclass(cls, sizes, dtype=dtype, device=weight.device)
        return made

    def __init__(self, layer: nn.Linear) -> None:
        own: Any = copy_layer(layer)
        own.bias = None
        self.layer = own

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Fields | None = None
    ) -> Any:
        if function is not F.linear or not isinstance(args[1], cls):
            return super().__torch_function__(function, types, args, kwargs)  # type: ignore[no-untyped-call]  # torch's
        x, weight, bias = (*args, None)[:3]
        y = weight.layer(x)
        return y if bias is None else y + bias.to(y.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's is declared as an instance's method
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Fields | None = None
    ) -> Any:
        values = [dequantise(value) if isinstance(value, cls) else value for value in args]
        return function(*values, **(kwargs or {}))


@dataclass(frozen=True, eq=False)
class QuantisedMatrix:
    """A matrix (out, in) as (whole − zero)·scale, or level[whole]·scale, with a scale per group of values in a row.

    Attributes:
        bits: 4 or 8; the integers are from −2^(bits − 1) to 2^(bits − 1) − 1.
        whole: (out, in), int8.
        scale: (out, groups).
        zero: (out, groups); None if all are 0.
        table: key of ``QUANTISATION_LEVELS``; empty if the integers are the values.
    """

    bits: int
    whole: Tensor
    scale: Tensor
    zero: Tensor | None = None
    table: str = ""

    @property
    def group(self) -> int:
        """The number of values that share a scale."""
        return self.whole.shape[1] // self.scale.shape[1]

    def dequantised(self) -> Tensor:
        """Return the matrix in float32."""
        whole = self.whole.float()
        if self.table:
            whole = torch.tensor(QUANTISATION_LEVELS[self.table])[self.whole.long() + 8]
        grouped = whole.unflatten(1, (-1, self.group))
        if self.zero is not None:
            grouped = grouped - self.zero.float().unsqueeze(-1)
        return (grouped * self.scale.float().unsqueeze(-1)).flatten(1)

    def __deepcopy__(self, memo: object) -> "QuantisedMatrix":
        """Return the matrix itself, since its tensors are never written."""
        return self


@dataclass(frozen=True, eq=False)
class QuantisedOrigin:
    """The quantised form of a weight that is now a float parameter.

    Attributes:
        kind: name of the quantised class.
        codes: its integers; None if they do not have the form of ``QuantisedMatrix``.
        rounds_inputs: whether its products also round their inputs, to integers or half precision.
    """

    kind: str
    codes: QuantisedMatrix | None
    rounds_inputs: bool = False


def dequantise_weights(model: nn.Module) -> nn.Module:
    """Return the model; if it has quantised weights, a structural copy in which they are float32 parameters.

    Raises:
        CaptureError: the values of a weight are lost.
    """
    if not any(True for module in model.modules() for _ in _find_quantised_weights(module)):
        return model
    copied = Host.of(model).copy(share_buffers=True).model
    for module in list(copied.modules()):
        for leaf, origin, value in list(_find_quantised_weights(module)):
            if origin.kind in {_LINEAR_8_BIT, _LINEAR_4_BIT}:
                module.__class__ = nn.Linear
            module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
            module.__dict__.setdefault(_ORIGINS, {})[leaf] = origin
    return copied


def settle_dequantised_weights(model: nn.Module) -> None:
    """Make a copy's dequantised weights plain: cast to the dtype of most other weights, without quantised origins."""
    names = {name for name, _ in iter_quantised_origins(model)}
    sizes: Counter[torch.dtype] = Counter()
    for name, parameter in model.named_parameters():
        sizes[parameter.dtype] += parameter.numel() if name not in names and parameter.is_floating_point() else 0
    dtype = sizes.most_common(1)[0][0] if sizes.total() else torch.float32
    for name in names:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        module.__dict__.pop(_ORIGINS, None)


def dequantise(weight: Tensor) -> Tensor:
    """Return the float values of a quantised weight; return any other tensor unchanged.

    Raises:
        CaptureError: as ``_read_bitsandbytes_layer``.
    """
    if type(weight) in (Tensor, nn.Parameter):
        return weight
    if isinstance(weight, LayerWeight):
        return next(_find_quantised_weights(weight.layer))[2]
    found = _read_quantised_tensor(weight)
    return weight if found is None else found[1]


def is_bitsandbytes_layer(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a module is a linear layer of bitsandbytes whose weight is quantised to integers."""
    weight = module._parameters.get("weight")
    return _find_bitsandbytes_kind(module) is not None and weight is not None and not weight.is_floating_point()


def iter_quantised_origins(model: nn.Module) -> Iterator[tuple[str, QuantisedOrigin]]:
    """Yield name and origin of a copy's dequantised weights; a shared weight is yielded under each of its names."""
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, origin in module.__dict__.get(_ORIGINS, {}).items():
            yield f"{path}.{leaf}" if path else leaf, origin


def find_quantised_class(module: nn.Module, leaf: str, weight: Tensor) -> str | None:
    """Return the class name of a quantised weight, or of one that was dequantised; None for a plain weight."""
    origin: QuantisedOrigin | None = module.__dict__.get(_ORIGINS, {}).get(leaf)
    if origin is not None:
        return origin.kind
    if isinstance(weight, LayerWeight):
        return type(module).__name__
    return None if type(weight) in (Tensor, nn.Parameter) else type(weight).__name__


def _find_quantised_weights(module: nn.Module) -> Iterator[tuple[str, QuantisedOrigin, Tensor]]:
    """Yield name, origin and float value of each quantised weight of a module."""
    kind = _find_bitsandbytes_kind(module)
    if kind is not None:
        found = _read_bitsandbytes_layer(kind, module)
        if found is not None:
            yield "weight", *found
        return
    for leaf, weight in module._parameters.items():
        found = None if weight is None or type(weight) is nn.Parameter else _read_quantised_tensor(weight)
        if found is not None:
            yield leaf, *found


def _find_bitsandbytes_kind(module: nn.Module) -> str | None:
    """Return the bitsandbytes class that a module's class is or derives from; None for other classes."""
    names = [cls.__name__ for cls in type(module).__mro__]
    return next(filter({_LINEAR_8_BIT, _LINEAR_4_BIT}.__contains__, names), None)


@torch.no_grad()
def _read_bitsandbytes_layer(kind: str, module: Any) -> tuple[QuantisedOrigin, Tensor] | None:
    """Return origin and float value of a bitsandbytes layer; None if its weight is not yet quantised."""
    weight = module.weight
    if weight.is_floating_point():
        return None
    if kind == _LINEAR_4_BIT:
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            raise CaptureError(
                f"a layer {kind} was called, which packed its weight for this processor with rounded scales",
                next_step="load the model again, and compile it before it is called",
            )
        state = weight.quant_state
        scale: Tensor = state.absmax  # one per block; itself quantised if statistics are compressed
        if state.nested:
            library = importlib.import_module("bitsandbytes.functional")
            scale = library.dequantize_blockwise(state.absmax, state.state2) + state.offset
        codes = _read_nf4_matrix(weight.data, state, scale.float())
        if codes is None:
            values = decode_4_bits(weight.data, state.code.to(weight.device), scale.float(), state.blocksize)
        value = values[: state.shape.numel()].view(*state.shape) if codes is None else codes.dequantised()
        halves = getattr(module, "compute_dtype", None) in {torch.bfloat16, torch.float16}
        repacks = getattr(module, "support_avx512bf16_for_cpu", False) and weight.device.type == "cpu"  # as bfloat16
        return QuantisedOrigin(kind, codes, halves or repacks), value
    rows = weight.SCB if weight.SCB is not None else module.state.SCB
    codes = QuantisedMatrix(8, weight.data, rows.float().unsqueeze(1) / _ABSMAX_8_BIT)
    return QuantisedOrigin(kind, codes, rounds_inputs=True), codes.dequantised()


def decode_4_bits(packed: Tensor, table: Tensor, scale: Tensor, block: int) -> Tensor:
    """Return the values of 4-bit numbers, two per byte with the first in the upper half, in blocks of one scale."""
    halves = packed.flatten().view(torch.uint8)
    values = table.float()[torch.stack([halves >> 4, halves & 15], -1).flatten().long()]
    return values * scale.float().repeat_interleave(block)[: len(values)]


def _read_nf4_matrix(data: Tensor, state: Any, scale: Tensor) -> QuantisedMatrix | None:
    """Return the integers of a 4-bit bitsandbytes matrix; None if it is not NF4, or a block spans rows."""
    if getattr(state, "quant_type", None) != NF4 or state.shape[1] % state.blocksize:
        return None
    if not torch.equal(state.code.float().cpu(), torch.tensor(QUANTISATION_LEVELS[NF4])):
        return None
    packed = data.flatten().view(torch.uint8)
    whole = torch.stack([packed >> 4, packed & 15], -1).view(*state.shape).to(torch.int8) - 8
    return QuantisedMatrix(4, whole, scale.view(len(whole), -1), table=NF4)


@torch.no_grad()
def _read_quantised_tensor(weight: Tensor) -> tuple[QuantisedOrigin, Tensor] | None:
    """Return origin and float value of a tensor of a library's class; None if it cannot be dequantised."""
    kind, parts = type(weight).__name__, vars(weight)
    rounds = any(parts.get(name) is not None for name in _INPUT_ROUNDING)
    if isinstance(parts.get("qdata"), Tensor) and isinstance(parts.get("scale"), Tensor) and weight.dim() == 2:
        whole, scale, zero = parts["qdata"], parts["scale"], parts.get("zero_point")
        by_rows = scale.dim() == 2 and len(scale) == len(whole) and whole.shape[1] % scale.shape[1] == 0
        if whole.dtype == torch.int8 and by_rows and parts.get(_INPUT_SCALE) is None:  # a layout of torchao's
            bits = 4 if str(parts.get("target_dtype")) == "torch.int4" else 8
            codes = QuantisedMatrix(bits, whole, scale, None if zero is None or not zero.any() else zero)
            return QuantisedOrigin(kind, codes, rounds), codes.dequantised()
    try:
        value, scale = weight.dequantize().float(), parts.get(_INPUT_SCALE)
        return QuantisedOrigin(kind, None, rounds), value if scale is None else value * scale
    except (RuntimeError, NotImplementedError, TypeError):  # torch's dequantize supports only torch's quantised tensors
        return None
