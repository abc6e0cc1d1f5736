"""Tiny hosts: non-square, with their input shapes and their meaning in plain array code.

Most have one adaptable site. Those of two, of unequal sizes, show what one cannot: what the first layer answers is what
the second reads, and a tensor that layers share is larger than one of them needs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lorac.errors import AdapterError, SiteError
from lorac.frontend.model_view import ModelView
from lorac.frontend.module_sites import make_module_site
from lorac.ir.sites import Site, SiteKind
from lorac.testing.models import (
    Block,
    Conv1D,
    GatedMLP,
    LayerStack,
    LayerWithFront,
    OneBlock,
    OneSite,
    SelfAttentionModel,
    TwoBlocks,
    TwoLayers,
    TwoMLPs,
    TwoTables,
)
from lorac.variants.base import BranchVariant, Variant

Array = np.ndarray
Tensor = torch.Tensor


@dataclass(frozen=True)
class Host:
    """A model with one site of a kind, or several.

    Attributes:
        name: the host's name in check names.
        kind: kind of its site.
        make: makes the model.
        sizes: shape of one example without batch dimensions; () for ids.
        apply: (x, W' (out, in), b' (out,)) -> y in array code, independent of lorac; None for blocks.
        batches: batch dimensions to call it with, all holding the same examples; () takes one of them.
        vocabulary: number of ids, where the input is ids.
        path: the site's path.
        others: paths of the further sites, where there are any.
        read: whether it is for methods that read values of the program, and for no others.
        deep: whether it stands for a model of several sites, for methods that have one site and read several layers.
    """

    name: str
    kind: SiteKind
    make: Callable[[], nn.Module]
    sizes: tuple[int, ...]
    apply: Callable[[Array, Array, Array], Array] | None
    batches: tuple[tuple[int, ...], ...] = ((12,), (3, 4), ())
    vocabulary: int = 0
    path: str = "site"
    others: tuple[str, ...] = ()
    read: bool = False
    deep: bool = False

    @property
    def several(self) -> bool:
        """Whether a method acts by several layers of it: what is checked of it then is of such models alone."""
        return self.deep or bool(self.others)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all its sites."""
        return (self.path, *self.others)

    @functools.cached_property
    def site(self) -> Site:
        """Its site; of several the first."""
        return self.sites[self.path]

    @functools.cached_property
    def sites(self) -> Mapping[str, Site]:
        """All its sites by path; a module is one because it is named."""
        found = self._view.sites
        return {path: found[path] if path in found else make_module_site(path, self._view) for path in self.paths}

    def settled(self, variant: Variant) -> Variant:
        """A method at this host's sites, as a fresh adapter has it.

        Raises:
            SiteError, AdapterError: it is not defined here.
        """
        return dataclasses.replace(variant, targets=self.paths).for_model(self._view)

    def admits(self, variant: Variant) -> bool:
        """Whether a method is defined here: on the sites' kind and shapes, and on what it reads besides."""
        try:
            here = self.settled(variant)
            for site in self.sites.values():
                self._check(here.at(site), site)
        except (SiteError, AdapterError):
            return False
        return True

    def _check(self, variant: Variant, site: Site) -> None:
        variant.check(site)
        reads = variant.reads(site) if isinstance(variant, BranchVariant) else ()
        if self.read and not reads:
            raise SiteError(
                f"'{self.name}' is for what reads values", next_step="test it on other hosts", code="site_unsupported"
            )
        if isinstance(variant, BranchVariant) and reads:
            variant.params(site)
            self._view.readable_values.check(reads, owns=variant.has_once)
            self._view.readable_values.check(variant.reads_once() if variant.has_once else (), once=True)

    @functools.cached_property
    def _view(self) -> ModelView:
        return ModelView.of(self._asked)

    @functools.cached_property
    def _asked(self) -> nn.Module:
        """The model that is only looked at: what a method says of it is asked for every configuration."""
        return self.model()

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model, the same weights every time, in eval mode; the process's random state is left alone."""
        return _build_fixed(self.make, dtype)

    def inputs(self, batch: tuple[int, ...]) -> Tensor:
        """One input with these batch dimensions, float64 or ids, the same every time."""
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
    """softmax(q·kᵀ/√d)·v by heads, behind the packed projection as it is."""
    attention = _build_fixed(_attention).site
    packed, shift = (t.detach().numpy() for t in (attention.in_proj_weight, attention.in_proj_bias))
    *batch, length, _ = x.shape
    parts = (x @ packed.T + shift).reshape(*batch, length, 3, _HEADS, _WIDTH // _HEADS)
    q, k, v = (np.moveaxis(parts[..., i, :, :], -2, -3) for i in range(3))
    scores = np.exp(q @ np.swapaxes(k, -1, -2) / (_WIDTH // _HEADS) ** 0.5)
    seen = scores / scores.sum(-1, keepdims=True) @ v
    return np.moveaxis(seen, -3, -2).reshape(*batch, length, _WIDTH) @ weight.T + bias


def _attention() -> nn.Module:
    return SelfAttentionModel(_WIDTH, _HEADS)


def _build_fixed(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> Any:
    """A model, the same weights every time, in eval mode; the process's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(11)  # torch.manual_seed would seed GPUs too, which are not put back
        return make().to(dtype).eval()


def _one_layer_host(name: str, kind: SiteKind, make: Callable[[], nn.Module], **rest: object) -> tuple[str, Host]:
    return name, Host(name, kind, lambda: OneSite(make()), **rest)  # type: ignore[arg-type]  # fields by name


def _convolution(channels: int, filters: int) -> nn.Conv2d:
    """Of the geometry that ``_strided`` has."""
    return nn.Conv2d(channels, filters, 3, stride=2, padding=1)


def _two_layer_host(name: str, kind: SiteKind, make: Callable[[], nn.Module], **rest: object) -> tuple[str, Host]:
    fields = {"path": "first", "others": ("second",), "batches": ((3, 4), (12,), (2, 5)), **rest}
    return name, Host(name, kind, make, **fields)  # type: ignore[arg-type]  # fields by name


HOSTS: Mapping[str, Host] = dict(
    (
        _one_layer_host("linear", SiteKind.LINEAR, lambda: nn.Linear(7, 11), sizes=(7,), apply=_apply_linear),
        _one_layer_host("divisible", SiteKind.LINEAR, lambda: nn.Linear(12, 6), sizes=(12,), apply=_apply_linear),
        _one_layer_host(
            "no_bias", SiteKind.LINEAR, lambda: nn.Linear(9, 8, bias=False), sizes=(9,), apply=_apply_linear
        ),
        _one_layer_host("transposed", SiteKind.LINEAR, lambda: Conv1D(11, 7), sizes=(7,), apply=_apply_linear),
        _one_layer_host(
            "conv",
            SiteKind.CONV2D,
            lambda: _convolution(3, 8),
            sizes=(3, 6, 5),
            apply=_apply_strided_conv,
            batches=((6,), ()),
        ),
        _one_layer_host(
            "padded",
            SiteKind.CONV2D,
            lambda: nn.Conv2d(3, 8, 3, padding="same", padding_mode="circular"),
            sizes=(3, 5, 4),
            apply=_apply_padded_conv,
            batches=((6,), ()),
        ),
        _one_layer_host(
            "embedding", SiteKind.EMBEDDING, lambda: nn.Embedding(13, 6), sizes=(), apply=_apply_lookup, vocabulary=13
        ),
        (
            "attention",
            Host(
                "attention",
                SiteKind.LINEAR,
                _attention,
                (5, _WIDTH),
                _apply_attention,
                batches=((4,), ()),
                path="site.out_proj",
            ),
        ),
        (
            "block",
            Host("block", SiteKind.BLOCK, lambda: OneBlock(Block(7, 5)), (7,), None, path="blocks.0"),
        ),
        _one_layer_host("gated", SiteKind.BLOCK, lambda: GatedMLP(6, 10), sizes=(6,), apply=None),
        (
            "stack",
            Host(
                "stack",
                SiteKind.BLOCK,
                lambda: LayerStack(8, 5, 5),
                (5, 8),
                None,
                batches=((6,), (2, 3), ()),
                path="norm",
            ),
        ),
        _two_layer_host(
            "two_linear",
            SiteKind.LINEAR,
            lambda: TwoLayers(nn.Linear(12, 18), nn.Linear(18, 6)),
            sizes=(12,),
            apply=_apply_linear,
        ),
        _two_layer_host(
            "two_conv",
            SiteKind.CONV2D,
            lambda: TwoLayers(_convolution(3, 8), _convolution(8, 6)),
            sizes=(3, 6, 5),
            apply=_apply_strided_conv,
            batches=((6,), (4,)),
        ),
        _two_layer_host(
            "two_embedding",
            SiteKind.EMBEDDING,
            lambda: TwoTables(nn.Embedding(13, 6), nn.Embedding(9, 4)),
            sizes=(),
            apply=_apply_lookup,
            vocabulary=13,
        ),
        _two_layer_host(
            "two_block",
            SiteKind.BLOCK,
            lambda: TwoBlocks(Block(7, 5), Block(9, 4)),
            sizes=(7,),
            apply=None,
            path="blocks.0",
            others=("blocks.1",),
        ),
        _two_layer_host(
            "two_read",
            SiteKind.LINEAR,
            lambda: LayerWithFront(nn.Linear(7, 9), nn.Linear(9, 11)),
            sizes=(7,),
            apply=_apply_linear,
            path="front",
            others=("site",),
            read=True,
        ),
        _two_layer_host(
            "two_gated",
            SiteKind.BLOCK,
            lambda: TwoMLPs(GatedMLP(6, 10), GatedMLP(9, 10)),
            sizes=(6,),
            apply=None,
            read=True,
        ),
        (
            "two_stack",
            Host(
                "two_stack",
                SiteKind.BLOCK,
                lambda: LayerStack(8, 5, 3),
                (5, 8),
                None,
                batches=((6,), (2,)),
                path="norm",
                read=True,
                deep=True,
            ),
        ),
    )
)
"""Every host by name; those of two sites last."""
