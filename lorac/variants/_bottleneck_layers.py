"""What bottlenecks are made of: activations by their names, plain and hypercomplex layers, and coupling blocks.

Names are those of AdapterHub's ``BnConfig``. A layer is kept under a name: ``<name>`` (out, in) and ``<name>_bias``
(out,) of a plain one; of a hypercomplex one (PHM, Compacter: arXiv 2106.04647) the factors of H = Σᵢ rule_i ⊗ W_i.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lorac.ir.algebra.reduction import Params
from lorac.variants import _initialisers as _inits
from lorac.variants.base import Context
from lorac.variants.params import Init, InitContext, ParamSpec, Role

Tensor = torch.Tensor

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
"""By the names that transformers has for them, and AdapterHub's ``leakyrelu``."""


def truncated_normal_init(std: float) -> Init:
    """N(0, std²), drawn again where it is further than 2·std from zero."""

    def make(context: InitContext) -> Tensor:
        values = torch.empty(context.shape)
        return torch.nn.init.trunc_normal_(values, std=std, a=-2 * std, b=2 * std, generator=context.generator)

    return make


def uniform_init(bound: float) -> Init:
    """U(−bound, bound)."""

    def make(context: InitContext) -> Tensor:
        return torch.empty(context.shape).uniform_(-bound, bound, generator=context.generator)

    return make


def ones_init(context: InitContext) -> Tensor:
    """All ones."""
    return torch.ones(context.shape)


def xavier_normal_init(context: InitContext) -> Tensor:
    """N(0, 2 / (fan_in + fan_out)) by the last two axes."""
    std = (2 / sum(context.shape[-2:])) ** 0.5
    return torch.empty(context.shape).normal_(0, std, generator=context.generator)


DOWN_UP: Mapping[str, tuple[Init, Init]] = {
    "bert": (_inits.normal(0.02), _inits.normal(0.02)),
    "mam_adapter": (_inits.kaiming_uniform, _inits.zeros),
    "houlsby": (truncated_normal_init(0.01), truncated_normal_init(0.01)),
}
"""AdapterHub's ``init_weights``: how the two weights of a plain bottleneck start. Biases are zero."""


@dataclass(frozen=True)
class HypercomplexLayer:
    """A hypercomplex layer: y = x·H + b, H (in, out) = Σᵢ rule_i ⊗ W_i, i < n.

    Attributes:
        n: BnConfig's phm_dim, which divides in and out.
        rank: phm_rank, of W_i = left_i·right_i where it is factorized.
        factorized: factorized_phm_W.
        shared: shared_W_phm: one W for all sites.
        shared_rule: shared_phm_rule: one rule for all sites.
        factorized_rule: factorized_phm_rule: rule_i = left_i·right_i, of rank 1.
        learned: learn_phm: the rule is trained.
        bias: phm_bias.
        start: phm_c_init, of the rule: "normal" or "uniform".
        std: phm_init_range, of a shared rule that starts normal.
    """

    n: int
    rank: int
    factorized: bool
    shared: bool
    shared_rule: bool
    factorized_rule: bool
    learned: bool
    bias: bool
    start: str
    std: float

    def specs(self, name: str, takes: int, gives: int) -> dict[str, ParamSpec]:
        """The tensors of one layer; the rule, where all layers share it, is called ``phm_rule``."""
        wide, high = takes // self.n, gives // self.n
        shapes = {f"{name}_W": (self.n, wide, high)}
        if self.factorized:
            shapes = {f"{name}_W_left": (self.n, wide, self.rank), f"{name}_W_right": (self.n, self.rank, high)}
        found = {key: ParamSpec(shape, xavier_normal_init, shared=self.shared) for key, shape in shapes.items()}
        if self.bias:
            found[f"{name}_bias"] = ParamSpec((gives,), _inits.zeros)
        return found | {self._rule(name) + suffix: spec for suffix, spec in self._rules().items()}

    def _rule(self, name: str) -> str:
        return "phm_rule" if self.shared_rule else f"{name}_phm_rule"

    def _rules(self) -> dict[str, ParamSpec]:
        n, role = self.n, Role.TRAINABLE if self.learned else Role.FROZEN
        bound, std = (1.0, self.std) if self.shared_rule else (0.01, 0.01)
        start = uniform_init(bound) if self.start == "uniform" else _inits.normal(std)
        shapes = {"_left": (n, n, 1), "_right": (n, 1, n)} if self.factorized_rule else {"": (n, n, n)}
        return {suffix: ParamSpec(shape, start, role, shared=self.shared_rule) for suffix, shape in shapes.items()}

    def matrix(self, p: Params, name: str) -> Tensor:
        """H transposed, (out, in)."""
        rule = _product(p, self._rule(name), self.factorized_rule)
        w = _product(p, f"{name}_W", self.factorized)
        blocks = (rule.mT[:, :, None, :, None] * w.mT[:, None, :, None, :]).sum(0)
        return blocks.reshape(rule.shape[2] * w.shape[2], rule.shape[1] * w.shape[1])


def _product(p: Params, name: str, factorized: bool) -> Tensor:
    """A stack of matrices, or the product of its two factors."""
    found: Tensor = getattr(p, f"{name}_left") @ getattr(p, f"{name}_right") if factorized else getattr(p, name)
    return found


def plain_layer(name: str, takes: int, gives: int, init: Init) -> dict[str, ParamSpec]:
    """The tensors of a plain layer."""
    return {name: ParamSpec((gives, takes), init), f"{name}_bias": ParamSpec((gives,), _inits.zeros)}


def apply_layer(z: Tensor, p: Params, name: str, phm: HypercomplexLayer | None = None) -> Tensor:
    """A layer's answer (…, out) to z (…, in)."""
    weight = getattr(p, name) if phm is None else phm.matrix(p, name)
    return F.linear(z, weight, getattr(p, f"{name}_bias", None))


def drop_by_site(value: Tensor, rate: float, ctx: Context, shape: Sequence[int]) -> Tensor:
    """Dropout, in training, by a mask of a shape; each site draws its own from the call's one stream."""
    if not rate or not ctx.training or ctx.generator is None:
        return value
    seed = ctx.generator.initial_seed() ^ zlib.crc32(f"{ctx.site.path} {len(shape)} {shape[-1]}".encode())
    kept = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) >= rate
    return value * kept.to(value) / (1 - rate)


# ── Coupling blocks ──────────────────────────────────────────────────────────────────────────────────────────────────
def coupling_specs(width: int, reduction: float) -> dict[str, ParamSpec]:
    """The tensors of a NICE block on ``width`` channels: F and G, bottlenecks between its halves; one for all sites."""
    one, two = width // 2, width - width // 2
    init = _inits.normal(0.02)
    found: dict[str, ParamSpec] = {}
    for name, takes, gives in (("F", two, one), ("G", one, two)):
        narrow = int(takes // reduction)
        found |= plain_layer(f"{name}_down", takes, narrow, init) | plain_layer(f"{name}_up", narrow, gives, init)
    return {name: ParamSpec(spec.shape, spec.init, shared=True) for name, spec in found.items()}


def apply_coupling(x: Tensor, p: Params, act: Callable[[Tensor], Tensor]) -> Tensor:
    """NICE: y₁ = x₁ + F(x₂), y₂ = x₂ + G(y₁), of the halves of x (…, width)."""
    one, two = _halves(x)
    first = one + _apply_bottleneck(two, p, "F", act)
    return torch.cat([first, two + _apply_bottleneck(first, p, "G", act)], dim=-1)


def invert_coupling(y: Tensor, p: Params, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Its inverse: x₂ = y₂ − G(y₁), x₁ = y₁ − F(x₂)."""
    one, two = _halves(y)
    second = two - _apply_bottleneck(one, p, "G", act)
    return torch.cat([one - _apply_bottleneck(second, p, "F", act), second], dim=-1)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _apply_bottleneck(z: Tensor, p: Params, name: str, act: Callable[[Tensor], Tensor]) -> Tensor:
    return apply_layer(act(apply_layer(z, p, f"{name}_down")), p, f"{name}_up")


# ── AdapterHub's names ───────────────────────────────────────────────────────────────────────────────────────────────
_PLAIN: dict[str, dict[str, Any]] = {
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
PRESETS: Mapping[str, Mapping[str, Any]] = {
    **_PLAIN,
    "scaled_par_bn": {**_PLAIN["par_bn"], "scaling": "learned"},
    "compacter": _HYPERCOMPLEX,
    "compacter++": {**_PLAIN["seq_bn"], **_HYPERCOMPLEX},
    "seq_bn_inv": {**_PLAIN["seq_bn"], **_INVERTIBLE},
    "double_seq_bn_inv": _INVERTIBLE,
}
"""AdapterHub's named configurations, and what in them differs from ``Bottleneck()``."""
