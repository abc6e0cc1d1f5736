"""The layers of bottlenecks: activations by name, plain and hypercomplex layers, and coupling blocks.

Names are from AdapterHub's ``BnConfig``. A plain layer has the tensors ``<name>`` (out, in) and ``<name>_bias`` (out,);
a hypercomplex layer (PHM, Compacter: arXiv 2106.04647) has the factors of H = Σᵢ rule_i ⊗ W_i.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from lorac.argument_types import Bounds, Count, OneOf
from lorac.variants.base import Context, Init, Params, ParamSpec, Role, Tensor, Variant
from lorac.variants.initialisers import kaiming_uniform, normal, truncated_normal, uniform, xavier_normal, zeros

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda z: F.gelu(z, approximate="tanh"),
    "gelu_pytorch_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "swish": F.silu,
    "silu": F.silu,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "mish": F.mish,
    "relu6": F.relu6,
    "leakyrelu": F.leaky_relu,
    "linear": lambda z: z,
}
"""Activations by transformers' names, and AdapterHub's ``leakyrelu``."""


DOWN_UP: Mapping[str, tuple[Init, Init]] = {
    "bert": (normal(0.02), normal(0.02)),
    "mam_adapter": (kaiming_uniform, zeros),
    "houlsby": (truncated_normal(0.01), truncated_normal(0.01)),
}
"""AdapterHub's ``init_weights``: start values of the two weights of a plain bottleneck. Biases start at zero."""


@dataclass(frozen=True, kw_only=True)
class HypercomplexFields(Variant):
    """The hyper-parameters of layers that may be hypercomplex: y = x·H + b, H (in, out) = Σᵢ rule_i ⊗ W_i, i < phm_dim.

    Attributes:
        phm_layer: whether the layers D and U are hypercomplex (Compacter).
        phm_dim: number of terms of H; a divisor of in and out.
        phm_rank: the rank of W_i = left_i·right_i if it is factorized.
        phm_bias: whether the layers have a bias b.
        factorized_phm_W: whether W_i = left_i·right_i.
        shared_W_phm: whether all sites share W.
        shared_phm_rule: whether all sites share the rule.
        factorized_phm_rule: whether rule_i = left_i·right_i, of rank 1.
        learn_phm: whether the rule is trained.
        phm_c_init: the distribution of the rule's start values: ``"normal"`` or ``"uniform"``.
        phm_init_range: the deviation of a shared rule with normal start values.
    """

    phm_layer: bool = False
    phm_dim: Count = 4
    phm_rank: Count = 1
    phm_bias: bool = True
    factorized_phm_W: bool = True
    shared_W_phm: bool = False
    shared_phm_rule: bool = True
    factorized_phm_rule: bool = False
    learn_phm: bool = True
    phm_c_init: Annotated[str, OneOf(("normal", "uniform"))] = "normal"
    phm_init_range: Annotated[float, Bounds(0)] = 0.0001

    def hypercomplex_layer(self, name: str, inputs: int, outputs: int) -> dict[str, ParamSpec]:
        """Return the tensors of one hypercomplex layer; a rule that all layers share is called ``phm_rule``."""
        rows, columns = inputs // self.phm_dim, outputs // self.phm_dim
        sizes = {"": (rows, columns)}
        if self.factorized_phm_W:
            sizes = {"_left": (rows, self.phm_rank), "_right": (self.phm_rank, columns)}
        shapes = {f"{name}_W{suffix}": (self.phm_dim, *size) for suffix, size in sizes.items()}
        found = {key: ParamSpec(shape, xavier_normal, shared=self.shared_W_phm) for key, shape in shapes.items()}
        if self.phm_bias:
            found[f"{name}_bias"] = ParamSpec((outputs,), zeros)
        n, shared, role = self.phm_dim, self.shared_phm_rule, Role.TRAINABLE if self.learn_phm else Role.FROZEN
        bound, std = (1.0, self.phm_init_range) if shared else (0.01, 0.01)
        start = uniform(bound) if self.phm_c_init == "uniform" else normal(std)
        rule = {"_left": (n, n, 1), "_right": (n, 1, n)} if self.factorized_phm_rule else {"": (n, n, n)}
        specs = {suffix: ParamSpec(shape, start, role, shared=shared) for suffix, shape in rule.items()}
        return found | {self._rule_name(name) + suffix: spec for suffix, spec in specs.items()}

    def apply_layer(self, z: Tensor, p: Params, name: str) -> Tensor:
        """Return a layer's output (…, out) for z (…, in)."""
        bias = getattr(p, f"{name}_bias", None)
        if not self.phm_layer:
            return F.linear(z, getattr(p, name), bias)
        rule = _product(p, self._rule_name(name), self.factorized_phm_rule)
        w = _product(p, f"{name}_W", self.factorized_phm_W)
        blocks = (rule.mT[:, :, None, :, None] * w.mT[:, None, :, None, :]).sum(0)  # blocks of Hᵀ
        return F.linear(z, blocks.reshape(rule.shape[2] * w.shape[2], rule.shape[1] * w.shape[1]), bias)

    def _rule_name(self, name: str) -> str:
        return "phm_rule" if self.shared_phm_rule else f"{name}_phm_rule"


def _product(p: Params, name: str, factorized: bool) -> Tensor:
    """Return a stack of matrices, or the product of two stacked factors if ``factorized``."""
    return getattr(p, f"{name}_left") @ getattr(p, f"{name}_right") if factorized else getattr(p, name)


def plain_layer(name: str, inputs: int, outputs: int, init: Init) -> dict[str, ParamSpec]:
    """Return the tensors of a plain layer."""
    return {name: ParamSpec((outputs, inputs), init), f"{name}_bias": ParamSpec((outputs,), zeros)}


def drop_by_site(value: Tensor, rate: float, ctx: Context, shape: Sequence[int]) -> Tensor:
    """Apply dropout in training, with a mask of the given shape that is different at each site."""
    if not rate or not ctx.training or ctx.generator is None:
        return value
    seed = ctx.generator.initial_seed() ^ zlib.crc32(f"{ctx.site.path} {len(shape)} {shape[-1]}".encode())
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) >= rate
    return value * mask.to(value) / (1 - rate)


_WIDEST = 2**31 - 1
"""The most channels that a bottleneck may have."""


def narrow_width(width: int, reduction: float) -> int:
    """Return the width of a bottleneck, limited to the largest size of a tensor for a very small reduction."""
    return int(min(width // reduction, _WIDEST))


def coupling_specs(width: int, reduction: float) -> dict[str, ParamSpec]:
    """Return the shared tensors of a NICE block of ``width`` channels: the bottlenecks F and G between its halves."""
    first, second = width // 2, width - width // 2
    init = normal(0.02)
    found: dict[str, ParamSpec] = {}
    for name, inputs, outputs in (("F", second, first), ("G", first, second)):
        narrow = narrow_width(inputs, reduction)
        found |= plain_layer(f"{name}_down", inputs, narrow, init) | plain_layer(f"{name}_up", narrow, outputs, init)
    return {name: ParamSpec(spec.shape, spec.init, shared=True) for name, spec in found.items()}


def apply_coupling(x: Tensor, p: Params, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply NICE to the halves of x (…, width): y₁ = x₁ + F(x₂), y₂ = x₂ + G(y₁)."""
    x1, x2 = _halves(x)
    y1 = x1 + _apply_bottleneck(x2, p, "F", act)
    return torch.cat([y1, x2 + _apply_bottleneck(y1, p, "G", act)], dim=-1)


def invert_coupling(y: Tensor, p: Params, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Invert ``apply_coupling``: x₂ = y₂ − G(y₁), x₁ = y₁ − F(x₂)."""
    y1, y2 = _halves(y)
    x2 = y2 - _apply_bottleneck(y1, p, "G", act)
    return torch.cat([y1 - _apply_bottleneck(x2, p, "F", act), x2], dim=-1)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _apply_bottleneck(z: Tensor, p: Params, name: str, act: Callable[[Tensor], Tensor]) -> Tensor:
    narrow = act(F.linear(z, getattr(p, f"{name}_down"), getattr(p, f"{name}_down_bias")))
    return F.linear(narrow, getattr(p, f"{name}_up"), getattr(p, f"{name}_up_bias"))


_PLAIN: dict[str, dict[str, object]] = {
    "double_seq_bn": {},
    "seq_bn": {"mh_adapter": False, "original_ln_before": True, "non_linearity": "relu"},
    "par_bn": {
        "mh_adapter": False,
        "is_parallel": True,
        "non_linearity": "relu",
        "reduction_factor": 2.0,
        "init_weights": "mam_adapter",
        "scaling": 4.0,
    },
    "adapter_plus": {
        "mh_adapter": False,
        "original_ln_before": True,
        "original_ln_after": False,
        "residual_before_ln": False,
        "non_linearity": "gelu",
        "reduction_factor": 96.0,
        "init_weights": "houlsby",
        "scaling": "channel",
        "stochastic_depth": 0.1,
    },
}
_HYPERCOMPLEX = {"phm_layer": True, "reduction_factor": 32.0, "non_linearity": "gelu"}
_INVERTIBLE = {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2.0}
PRESETS: Mapping[str, Mapping[str, object]] = {
    **_PLAIN,
    "scaled_par_bn": {**_PLAIN["par_bn"], "scaling": "learned"},
    "compacter": _HYPERCOMPLEX,
    "compacter++": {**_PLAIN["seq_bn"], **_HYPERCOMPLEX},
    "seq_bn_inv": {**_PLAIN["seq_bn"], **_INVERTIBLE},
    "double_seq_bn_inv": _INVERTIBLE,
}
"""AdapterHub's named configurations, as differences from ``Bottleneck()``."""
