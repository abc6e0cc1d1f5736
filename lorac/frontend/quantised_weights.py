"""Weights that came quantised: what they come to in float, and their codes, where a program can hold those as they are.

Libraries hold such a weight in a tensor or a layer of a class of their own, with kernels of their own. A program that
is emitted has none of these: it is captured of a copy whose weights are plain parameters, which remember their codes.
Nothing of the libraries is imported to tell; theirs are known by what their classes are called and hold.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorac.errors import CaptureError
from lorac.frontend.copying import copy_structure

_ORIGIN_ATTRIBUTE = "_lorac_came_as"
"""The attribute of a module of a copy that says which of its weights came quantised."""
_IN_8_BITS, _IN_4_BITS = "Linear8bitLt", "Linear4bit"
"""Layers of bitsandbytes."""
_LARGEST = 127
"""What the largest value of a row is held as, in 8 bits of bitsandbytes."""
NF4 = "nf4"
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
QUANTISATION_LEVELS = {NF4: _NF4}
"""By name, what the numbers of 4 bits stand for where they are no numbers: the quantiles of a normal distribution,
"QLoRA: Efficient Finetuning of Quantized LLMs", Dettmers et al. 2023, arXiv 2305.14314."""


@dataclass(frozen=True, eq=False)
class QuantisedMatrix:
    """A matrix (out, in) as (whole − zero)·scale, or level[whole]·scale, by groups of neighbours in a row.

    Attributes:
        bits: 4 or 8; the numbers are from −2^(bits − 1) to 2^(bits − 1) − 1.
        whole: (out, in), int8.
        scale: (out, groups).
        zero: (out, groups), or None where it is 0 throughout.
        table: of ``TABLES`` the levels that the numbers stand for, from the lowest on; empty where for themselves.
    """

    bits: int
    whole: Tensor
    scale: Tensor
    zero: Tensor | None = None
    table: str = ""

    @property
    def group(self) -> int:
        """How many values share a scale."""
        return self.whole.shape[1] // self.scale.shape[1]

    def dequantised(self) -> Tensor:
        """The matrix, in float32."""
        levels = (
            torch.tensor(QUANTISATION_LEVELS[self.table])[self.whole.long() + 8] if self.table else self.whole.float()
        )
        whole = levels.unflatten(1, (-1, self.group))
        if self.zero is not None:
            whole = whole - self.zero.float().unsqueeze(-1)
        return (whole * self.scale.float().unsqueeze(-1)).flatten(1)

    def __deepcopy__(self, memo: Any) -> QuantisedMatrix:
        """Itself: nobody writes into it."""
        return self


@dataclass(frozen=True, eq=False)
class QuantisedOrigin:
    """A weight that came quantised.

    Attributes:
        kind: the class that held it.
        codes: its codes; None where they are of another form than ``QuantisedMatrix``.
    """

    kind: str
    codes: QuantisedMatrix | None


def dequantise_weights(model: nn.Module) -> nn.Module:
    """The model, or a structural copy where it has quantised weights: there they are parameters, in float32."""
    if not any(True for module in model.modules() for _ in _find_quantised_weights(module)):
        return model
    copy = copy_structure(model, share_buffers=True)
    for module in list(copy.modules()):
        for leaf, came, value in list(_find_quantised_weights(module)):
            _make_plain(module, leaf, came, value)
    return copy


def _make_plain(module: nn.Module, leaf: str, came: QuantisedOrigin, value: Tensor) -> None:
    """Put what a quantised weight comes to in its place, in a module of a copy."""
    if came.kind in {_IN_8_BITS, _IN_4_BITS}:
        module.__class__ = nn.Linear
    module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    module.__dict__.setdefault(_ORIGIN_ATTRIBUTE, {})[leaf] = came


def iter_quantised_origins(model: nn.Module) -> Iterator[tuple[str, QuantisedOrigin]]:
    """The weights of a copy that came quantised, by name; one that is shared under each of its names."""
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, came in module.__dict__.get(_ORIGIN_ATTRIBUTE, {}).items():
            yield f"{path}.{leaf}" if path else leaf, came


def find_quantised_class(module: nn.Module, leaf: str, weight: Tensor) -> str | None:
    """The class that stands for a weight, or did before it was dequantised; None for a plain one."""
    came: QuantisedOrigin | None = module.__dict__.get(_ORIGIN_ATTRIBUTE, {}).get(leaf)
    if came is not None:
        return came.kind
    return None if type(weight) in (Tensor, nn.Parameter) else type(weight).__name__


def _find_quantised_weights(module: nn.Module) -> Iterator[tuple[str, QuantisedOrigin, Tensor]]:
    """Name, origin and float value of each quantised weight of a module."""
    kind = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in {_IN_8_BITS, _IN_4_BITS}), None)
    if kind is not None:
        found = _read_bitsandbytes_layer(kind, module)
        yield from [] if found is None else [("weight", *found)]
        return
    for leaf, weight in module._parameters.items():
        if weight is not None and type(weight) is not nn.Parameter:
            found = _read_quantised_tensor(weight)
            yield from [] if found is None else [(leaf, *found)]


@torch.no_grad()
def _read_bitsandbytes_layer(kind: str, module: Any) -> tuple[QuantisedOrigin, Tensor] | None:
    """What the weight of a layer of bitsandbytes comes to; None of one that is in float still.

    Raises:
        CaptureError: what the weight came with is lost.
    """
    weight = module.weight
    if weight.is_floating_point():
        return None
    if kind == _IN_4_BITS:
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            raise CaptureError(
                f"a layer {kind} was called, and has packed its weight for this processor, with rounded scales",
                next_step="load the model again, and compile it before it is called",
                code="capture_failed",
            )
        library = importlib.import_module("bitsandbytes.functional")
        found = _read_nf4_matrix(weight.data, weight.quant_state, library)
        value = (
            library.dequantize_4bit(weight.data, weight.quant_state).float() if found is None else found.dequantised()
        )
        return QuantisedOrigin(kind, found), value
    rows = weight.SCB if weight.SCB is not None else module.state.SCB
    codes = QuantisedMatrix(8, weight.data, rows.float().unsqueeze(1) / _LARGEST)
    return QuantisedOrigin(kind, codes), codes.dequantised()


def _read_nf4_matrix(data: Tensor, state: Any, library: Any) -> QuantisedMatrix | None:
    """The codes of a matrix of bitsandbytes in 4 bits; None where they are not NF4's, or blocks end amid rows."""
    if getattr(state, "quant_type", None) != NF4 or state.shape[1] % state.blocksize:
        return None
    if not torch.equal(state.code.float().cpu(), torch.tensor(QUANTISATION_LEVELS[NF4])):
        return None
    # What scales the blocks is quantised too where statistics are compressed.
    scale = library.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    packed = data.flatten().view(torch.uint8)
    whole = torch.stack([packed >> 4, packed & 15], -1).view(*state.shape).to(torch.int8) - 8
    return QuantisedMatrix(4, whole, scale.float().view(len(whole), -1), table=NF4)


@torch.no_grad()
def _read_quantised_tensor(weight: Any) -> tuple[QuantisedOrigin, Tensor] | None:
    """What a tensor of a class of its own comes to; None where it does not say."""
    kind = type(weight).__name__
    parts = vars(weight)
    if isinstance(parts.get("qdata"), Tensor) and isinstance(parts.get("scale"), Tensor) and weight.dim() == 2:
        codes = _read_torchao_matrix(parts)
        return None if codes is None else (QuantisedOrigin(kind, codes), codes.dequantised())
    try:
        return QuantisedOrigin(kind, None), weight.dequantize().float()
    except (RuntimeError, NotImplementedError, TypeError):  # torch's own method is of torch's own kind of tensor
        return None


def _read_torchao_matrix(parts: dict[str, Any]) -> QuantisedMatrix | None:
    """The codes in a tensor of torchao's, by the names that it gives its parts."""
    whole, scale, zero = parts["qdata"], parts["scale"], parts.get("zero_point")
    bits = 4 if str(parts.get("target_dtype")) == "torch.int4" else 8
    by_rows = scale.dim() == 2 and len(scale) == len(whole) and whole.shape[1] % scale.shape[1] == 0
    if whole.dtype != torch.int8 or not by_rows or parts.get("act_pre_scale") is not None:
        return None
    return QuantisedMatrix(bits, whole, scale, None if zero is None or not zero.any() else zero)
