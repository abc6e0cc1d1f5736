"""Tiny models for conformance checks, with their input shapes and, for layers, their computation in array code.

The matrices are not square. Most models have one adaptable site. In the models with two sites of unequal sizes, the
second layer reads the output of the first, and a tensor that both share is larger than the smaller one needs.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorac.argument_types import Fields
from lorac.errors import AdapterError, OptionError, SiteError
from lorac.frontend.model_view import ModelView
from lorac.frontend.module_sites import make_module_site
from lorac.ir.sites.site import Site, SiteKind
from lorac.testing.models import (
    Block,
    GatedMLP,
    LayerStack,
    SelfAttentionModel,
    TransposedLinear,
    TwoBlocks,
    TwoMLPs,
    TwoTables,
    chain_layers,
)
from lorac.variants.base import BranchVariant, Variant

Array = np.ndarray


@dataclass(frozen=True)
class ConformanceHost:
    """A model with one or several sites, all of one kind.

    Attributes:
        name: name of the host in the names of checks.
        kind: kind of the sites.
        make: builds the model.
        sizes: shape of one example without batch dimensions; () for ids.
        apply: (x, adapted weight W' (out, in), adapted bias b' (out,)) -> output of the site, in array code independent
            of lorac; None for blocks, and for linear layers and embeddings without ops of their own.
        batches: batch dimensions of each call of a check; () is one example without batch dimensions.
        vocabulary: number of ids if the input is ids, else 0.
        path: path of the first site.
        others: paths of the further sites.
        read: whether the host is only for methods that read values of the program, such as other layers' outputs.
        deep: whether the checks of two layers apply although the model has one site: it is for methods that act at one
            site and read several layers.
    """

    name: str
    kind: SiteKind
    make: Callable[[], nn.Module]
    sizes: tuple[int, ...]
    apply: Callable[[Array, Array, Array], Array] | None = None
    batches: tuple[tuple[int, ...], ...] = ((12,), (3, 4), ())
    vocabulary: int = 0
    path: str = "site"
    others: tuple[str, ...] = ()
    read: bool = False
    deep: bool = False

    @property
    def several(self) -> bool:
        """Whether the checks of two layers apply, in place of those of one layer."""
        return self.deep or bool(self.others)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all sites."""
        return (self.path, *self.others)

    @functools.cached_property
    def site(self) -> Site:
        """The first site."""
        return self.sites[self.path]

    @functools.cached_property
    def sites(self) -> Mapping[str, Site]:
        """All sites by path. A module that is not a site of the model becomes one, as if an adapter named it."""
        known = self._view.sites
        return {path: known[path] if path in known else make_module_site(path, self._view) for path in self.paths}

    def compute(self, x: Array, weight: Array, bias: Array) -> Array:
        """Return the output of the site with an adapted weight (out, in) and bias (out,).

        Raises:
            OptionError: the host does not say how its kind of site computes.
        """
        apply = self.apply or {SiteKind.LINEAR: _apply_linear, SiteKind.EMBEDDING: _apply_lookup}.get(self.kind)
        if apply is None:
            raise OptionError(
                f"the host '{self.name}' does not define the product of its sites of kind {self.kind.value}",
                next_step="give apply=, a function of x, the weight (out, in) and the bias in NumPy",
            )
        return apply(x, weight, bias)

    def fit(self, variant: Variant) -> Variant:
        """Return a method with this host's sites as targets, fitted to the model as in a fresh adapter.

        Raises:
            SiteError, AdapterError: the method is not defined on this host.
        """
        return dataclasses.replace(variant, targets=self.paths).for_model(self._view)

    def admits(self, variant: Variant) -> bool:
        """Return whether a method is defined for the kind and shapes of the sites, and can read its values here."""
        try:
            fitted = self.fit(variant)
            for site in self.sites.values():
                self._check(fitted.at(site), site)
        except (SiteError, AdapterError):
            return False
        return True

    def _check(self, variant: Variant, site: Site) -> None:
        variant.check(site)
        reads = variant.reads(site) if isinstance(variant, BranchVariant) else ()
        if self.read and not reads:
            raise SiteError(f"'{self.name}' is only for methods that read values", next_step="test it on other hosts")
        if isinstance(variant, BranchVariant) and reads:
            variant.params(site)
            self._view.readable_values.check(reads, owns=variant.has_once)
            self._view.readable_values.check(variant.reads_once() if variant.has_once else (), once=True)

    @functools.cached_property
    def _view(self) -> ModelView:
        return ModelView.of(self.model())  # nothing changes this model, so all configurations share it

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Build the model, with the same weights every time, in eval mode."""
        return _build_fixed(self.make, dtype)

    def inputs(self, batch: tuple[int, ...]) -> Tensor:
        """Return an input with these batch dimensions, float64 or ids, the same every time."""
        generator = torch.Generator().manual_seed(7)
        shape = (*batch, *self.sizes)
        if self.vocabulary:
            return torch.randint(self.vocabulary, shape, generator=generator)
        return torch.randn(shape, generator=generator, dtype=torch.float64)


def _apply_linear(x: Array, weight: Array, bias: Array) -> Array:
    return x @ weight.T + bias


def _apply_lookup(x: Array, weight: Array, bias: Array) -> Array:
    return weight.T[x] + bias


def _apply_strided_conv(x: Array, weight: Array, bias: Array) -> Array:
    kernel = torch.from_numpy(weight).reshape(len(weight), -1, 3, 3)
    return F.conv2d(torch.from_numpy(x), kernel, torch.from_numpy(bias), stride=2, padding=1).numpy()


def _apply_padded_conv(x: Array, weight: Array, bias: Array) -> Array:
    kernel = torch.from_numpy(weight).reshape(len(weight), -1, 3, 3)
    around = F.pad(torch.from_numpy(x), (1, 1, 1, 1), mode="circular")
    return F.conv2d(around, kernel, torch.from_numpy(bias)).numpy()


_WIDTH, _HEADS = 6, 2


def _apply_attention(x: Array, weight: Array, bias: Array) -> Array:
    """Return softmax(q·kᵀ/√d)·v per head, after the model's own fused projection, times the output weight."""
    attention = _build_fixed(_attention).get_submodule("site")
    assert isinstance(attention, nn.MultiheadAttention)
    projection, shift = (attention.get_parameter(f"in_proj_{leaf}").detach().numpy() for leaf in ("weight", "bias"))
    *batch, length, _ = x.shape
    heads = (x @ projection.T + shift).reshape(*batch, length, 3, _HEADS, _WIDTH // _HEADS)
    q, k, v = (np.moveaxis(heads[..., i, :, :], -2, -3) for i in range(3))
    scores = np.exp(q @ np.swapaxes(k, -1, -2) / (_WIDTH // _HEADS) ** 0.5)
    values = scores / scores.sum(-1, keepdims=True) @ v
    return np.moveaxis(values, -3, -2).reshape(*batch, length, _WIDTH) @ weight.T + bias


def _attention() -> nn.Module:
    return SelfAttentionModel(_WIDTH, _HEADS)


def _build_fixed(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """Build a model with the same weights every time, in eval mode, without a change of the process's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(11)  # torch.manual_seed would seed GPUs too, whose state is not restored
        return make().to(dtype).eval()


def _single(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: chain_layers(site=layer())


def _pair(first: nn.Module, second: nn.Module) -> nn.Module:
    return chain_layers(first=first, tanh=nn.Tanh(), second=second)


def _convolution(channels: int, filters: int) -> nn.Conv2d:
    """Return a convolution with the geometry of ``_apply_strided_conv``."""
    return nn.Conv2d(channels, filters, 3, stride=2, padding=1)


_LINEAR, _CONV, _EMBEDDING, _BLOCK = SiteKind.LINEAR, SiteKind.CONV2D, SiteKind.EMBEDDING, SiteKind.BLOCK
_PAIR: Fields = {"path": "first", "others": ("second",), "batches": ((3, 4), (12,), (2, 5))}
_IMAGES = ((6,), ())
_PADDED = functools.partial(nn.Conv2d, 3, 8, 3, padding="same", padding_mode="circular")
_HOSTS = (
    ConformanceHost("linear", _LINEAR, _single(lambda: nn.Linear(7, 11)), (7,), _apply_linear),
    ConformanceHost("divisible", _LINEAR, _single(lambda: nn.Linear(12, 6)), (12,), _apply_linear),
    ConformanceHost("no_bias", _LINEAR, _single(lambda: nn.Linear(9, 8, bias=False)), (9,), _apply_linear),
    ConformanceHost("transposed", _LINEAR, _single(lambda: TransposedLinear(11, 7)), (7,), _apply_linear),
    ConformanceHost(
        "conv", _CONV, _single(lambda: _convolution(3, 8)), (3, 6, 5), _apply_strided_conv, batches=_IMAGES
    ),
    ConformanceHost("padded", _CONV, _single(_PADDED), (3, 5, 4), _apply_padded_conv, batches=_IMAGES),
    ConformanceHost("embedding", _EMBEDDING, _single(lambda: nn.Embedding(13, 6)), (), _apply_lookup, vocabulary=13),
    ConformanceHost(
        "attention", _LINEAR, _attention, (5, _WIDTH), _apply_attention, batches=((4,), ()), path="site.out_proj"
    ),
    ConformanceHost("block", _BLOCK, lambda: chain_layers(blocks=nn.Sequential(Block(7, 5))), (7,), path="blocks.0"),
    ConformanceHost("gated", _BLOCK, _single(lambda: GatedMLP(6, 10)), (6,)),
    ConformanceHost("stack", _BLOCK, lambda: LayerStack(8, 5, 5), (5, 8), batches=((6,), (2, 3), ()), path="norm"),
    ConformanceHost(
        "two_linear", _LINEAR, lambda: _pair(nn.Linear(12, 18), nn.Linear(18, 6)), (12,), _apply_linear, **_PAIR
    ),
    ConformanceHost(
        "two_conv",
        _CONV,
        lambda: _pair(_convolution(3, 8), _convolution(8, 6)),
        (3, 6, 5),
        _apply_strided_conv,
        **{**_PAIR, "batches": ((6,), (4,))},
    ),
    ConformanceHost(
        "two_embedding",
        _EMBEDDING,
        lambda: TwoTables(nn.Embedding(13, 6), nn.Embedding(9, 4)),
        (),
        _apply_lookup,
        vocabulary=13,
        **_PAIR,
    ),
    ConformanceHost(
        "two_block",
        _BLOCK,
        lambda: TwoBlocks(Block(7, 5), Block(9, 4)),
        (7,),
        **{**_PAIR, "path": "blocks.0", "others": ("blocks.1",)},
    ),
    ConformanceHost(
        "two_read",
        _LINEAR,
        lambda: chain_layers(front=nn.Linear(7, 9), tanh=nn.Tanh(), site=nn.Linear(9, 11)),
        (7,),
        _apply_linear,
        read=True,
        **{**_PAIR, "path": "front", "others": ("site",)},
    ),
    ConformanceHost("two_gated", _BLOCK, lambda: TwoMLPs(GatedMLP(6, 10), GatedMLP(9, 10)), (6,), read=True, **_PAIR),
    ConformanceHost(
        "two_stack",
        _BLOCK,
        lambda: LayerStack(8, 5, 3),
        (5, 8),
        batches=((6,), (2,)),
        path="norm",
        read=True,
        deep=True,
    ),
)
HOSTS: Mapping[str, ConformanceHost] = {host.name: host for host in _HOSTS}
"""Every host by name; the hosts whose ``several`` is true come last."""
