"""One variant on one host: the adapters, compiled models and references that its checks share."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from lorac.frontend.base_weights import read_bias
from lorac.frontend.site_discovery import find_sites
from lorac.ir.sites import Site
from lorac.ir.slots.execution import FormulaContext
from lorac.ir.slots.program_values import (
    BASE,
    IN,
    OUTPUT,
    OWN,
    PASS,
    WEIGHT,
    modules_by_pass,
    parse_value_name,
    pass_value_name,
    program_value_name,
)
from lorac.session.api import compile
from lorac.session.compiled import Compiled
from lorac.testing.hosts import Host
from lorac.testing.parity import contribution
from lorac.testing.samples import AIM, adapter_away
from lorac.variants.adapter import Adapter
from lorac.variants.base import BranchVariant, Variant, WeightVariant

Array = np.ndarray
Tensor = torch.Tensor


@dataclass(frozen=True)
class Oracle:
    """A method's equations in NumPy float64, written from its paper, without looking at the variant.

    ``p`` has one array per parameter, ``variant`` is the configuration at the site. Give those that the method has. Of
    one that reads program values, ``p.values`` has these by name; ``p.site`` is the site's path, and ``p.passing`` the
    name of the pass that is asked for, where it is one that the method has to itself, and else empty.

    Attributes:
        weight: (W (out, in), p, variant) -> W'.
        bias: (b (out,), W, p, variant) -> b'; zeros stand for a missing bias.
        branch: (x, y, p, variant) -> y', y the site's unadapted output.
        once: (p, variant) -> what the method computes once per call, by name, read as ``own:<name>``.
        count: (out, in, variant) -> number of trained values at one site.
    """

    weight: Callable[[Array, SimpleNamespace, Any], Array] | None = None
    bias: Callable[[Array, Array, SimpleNamespace, Any], Array] | None = None
    branch: Callable[[Array, Array, SimpleNamespace, Any], Array] | None = None
    count: Callable[[int, int, Any], int] | None = None
    once: Callable[[SimpleNamespace, Any], dict[str, Array]] | None = None

    @staticmethod
    def of(module: ModuleType) -> Oracle:
        """The functions of these names that a module has."""
        names = [field.name for field in dataclasses.fields(Oracle)]
        return Oracle(**{name: vars(module)[name] for name in names if name in vars(module)})


class Case:
    """What the checks of one variant on one host share; everything is made on first use.

    Args:
        variant: the configuration to test.
        host: where.
        oracle: the method's equations, or None.
    """

    def __init__(self, variant: Variant, host: Host, oracle: Oracle | None = None) -> None:
        self.given, self.host, self.oracle = variant, host, oracle

    @cached_property
    def variant(self) -> Variant:
        """The configuration at the host's sites; where it is not admitted as it was given."""
        admitted = self.host.admits(self.given)
        return self.host.settled(self.given) if admitted else dataclasses.replace(self.given, targets=self.host.paths)

    @cached_property
    def model(self) -> nn.Module:
        """The host in float64."""
        return self.host.model()

    @cached_property
    def site(self) -> Site:
        """The adapted site."""
        return self.host.site

    @cached_property
    def a(self) -> Adapter:
        """An adapter away from its init."""
        return adapter_away(self.variant, self.model, self.x, name="a", seed=1)

    @cached_property
    def b(self) -> Adapter:
        """Another one."""
        return adapter_away(self.variant, self.model, self.x, name="b", seed=2)

    @property
    def x(self) -> Tensor:
        """The input used where one is enough."""
        return self.host.inputs(self.host.batches[0])

    @cached_property
    def live(self) -> Compiled:
        """Adapter a, live, in eager float64."""
        return compile(self.model, {"a": self.a}, mode="live")

    @cached_property
    def mergeable(self) -> bool:
        """Whether the method has a weight form here; one that edits weights always has."""
        return not any(self.live.plans[path].branches for path in self.host.paths)

    @cached_property
    def model32(self) -> nn.Module:
        """The host in float32."""
        return copy.deepcopy(self.model).float()

    def compiled(self, *adapters: Adapter, **options: Any) -> Compiled:
        """A float64 model compiled with these adapters."""
        return compile(self.model, {adapter.name: adapter for adapter in adapters}, **options)

    def inputs(self, batch: tuple[int, ...]) -> Tensor:
        """An input with these batch dimensions; for none, the row of ``x`` whose contribution is nearest the aim."""
        if batch:
            return self.host.inputs(batch)
        with torch.no_grad():
            pairs = zip(self.live(self.x), self.model(self.x), strict=True)
            shares = [contribution(row, base)["output"] for row, base in pairs]
        return self.x[int(np.argmin(np.abs(np.array(shares) - AIM)))]

    @torch.no_grad()
    def base(self, x: Tensor) -> Tensor:
        """What the host answers."""
        return self.model(x)

    @torch.no_grad()
    def references(self, x: Tensor) -> dict[str, Tensor]:
        """What adapter a must answer, by every way to say it: the oracle's, or without one the formula's own."""
        read = self._passed(self.model, x, self._before(self.model, x), acts=False)[1]
        return self._answers(self.site, self.model, x, self.base(x), read)

    @torch.no_grad()
    def reference(self, model: nn.Module, x: Tensor) -> Tensor:
        """What a model of several sites must answer with adapter a, by one way to say it at each of them.

        Args:
            model: the host, in float64.
            x: its input.
        """
        return self._passed(model, x, self._before(model, x))[0]

    def _read(self, path: str) -> list[str]:
        """Names of the program values that the method reads at a site, and once."""
        site = self.host.sites[path]
        variant = self.variant.at(site)
        if not isinstance(variant, BranchVariant):
            return []
        return [*variant.reads(site), *(variant.reads_once() if variant.has_once else ())]

    def _before(self, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        """The program values that are there when a call of a model begins, by name."""
        names = list(dict.fromkeys(name for path in self.host.paths for name in self._read(path)))
        sites = find_sites(model)
        found = {
            name: _weight(sites[of], model) for name in names for kind, of in [parse_value_name(name)] if kind == WEIGHT
        }
        bases = [of for kind, of in map(parse_value_name, names) if kind == BASE]
        seen = self._passed(model, x, found, acts=False)[1] if bases else {}
        found |= {f"{BASE}:{of}": seen[of] for of in bases}
        for passing, paths in modules_by_pass(names).items():
            seen = self._passed(model, x, found, passing=passing)[1]
            found |= {pass_value_name(passing, of): seen[of] for of in paths}
        return found

    def _passed(
        self, model: nn.Module, x: Tensor, known: Mapping[str, Tensor], *, passing: str = "", acts: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What a model answers in a pass, and what of its modules is read there.

        Args:
            model: the host, in float64.
            x: its input.
            known: values that are there from the start.
            passing: which pass it is, where it is one that the method has to itself.
            acts: whether adapter a does.
        """
        seen = dict(known)

        def answer(site: Site) -> Callable[..., Tensor]:
            return lambda _, given, y: next(iter(self._answers(site, model, given[0], y, seen, passing).values()))

        def note(path: str, given: Tensor, y: Tensor) -> None:
            seen.update({f"{IN}:{path}": given, path: y})

        adapted = self.host.sites if acts and self.a else {}  # the adapter is made before anything is hooked
        hooks = [model.get_submodule(p).register_forward_hook(answer(site)) for p, site in adapted.items()]
        parsed = [parse_value_name(name) for path in self.host.paths for name in self._read(path)]
        for path in dict.fromkeys(of for kind, of in parsed if kind in {OUTPUT, IN, BASE, PASS}):
            hooks.append(
                model.get_submodule(path).register_forward_hook(lambda _, given, y, path=path: note(path, given[0], y))
            )
        try:
            return model(x), seen
        finally:
            for hook in hooks:
                hook.remove()

    def _answers(
        self, site: Site, model: nn.Module, x: Tensor, y: Tensor, seen: Mapping[str, Tensor], passing: str = ""
    ) -> dict[str, Tensor]:
        """What adapter a must answer at a site, by every way to say it.

        Args:
            site: the site.
            model: the host, in float64.
            x: the site's input.
            y: what the host's site answers.
            seen: program values by name, all that are there.
            passing: the name of the pass, as of ``_passed``.
        """
        read = {name: seen[name] for name in self._read(site.path) if name in seen}
        if self.oracle is None:
            return {"formula": self._formula(site, model, x, y, read, passing)}
        found = {}
        values = {name: _array(value) for name, value in read.items()}
        tensors = {name: _array(t) for name, t in self.a.tensors[site.path].items()}
        about = {"values": values, "site": site.path, "passing": passing}
        p = SimpleNamespace(**{**about, **tensors})  # a method's own tensor may be called as one of those
        variant = self.variant.at(site)
        if self.oracle.once is not None and not passing:
            values |= {f"{OWN}:{name}": value for name, value in self.oracle.once(p, variant).items()}
        if self.oracle.weight is not None:
            weight, bias = _array(_weight(site, model)), _array(_bias(site, model))
            new_weight = self.oracle.weight(weight, p, variant)
            if self.oracle.bias is not None:
                bias = self.oracle.bias(bias, weight, p, variant)
            assert self.host.apply is not None
            found["weight"] = torch.from_numpy(self.host.apply(_array(x), new_weight, bias))
        if self.oracle.branch is not None:
            found["branch"] = torch.from_numpy(self.oracle.branch(_array(x), _array(y), p, variant))
        assert found, "the oracle has neither weight() nor branch()"
        return found

    @property
    def weight(self) -> Tensor:
        """W (out, in)."""
        return _weight(self.site, self.model)

    @property
    def bias(self) -> Tensor:
        """b (out,), zeros where there is none."""
        return _bias(self.site, self.model)

    def _formula(
        self, site: Site, model: nn.Module, x: Tensor, y: Tensor, read: Mapping[str, Tensor], passing: str
    ) -> Tensor:
        variant = self.variant.at(site)
        p = SimpleNamespace(**self.a.tensors[site.path])
        if isinstance(variant, BranchVariant):
            values = {program_value_name("", name): value for name, value in read.items()}
            around = FormulaContext(site, values=values, passing=passing).within(y.dtype)
            own = variant.once(p, around) if variant.has_once and not passing else {}
            values |= {program_value_name("", f"{OWN}:{name}"): value for name, value in own.items()}
            return variant.branch(x, y, p, around)
        assert isinstance(variant, WeightVariant)
        assert self.host.apply is not None
        weight, bias = variant.weight(_weight(site, model), p), variant.new_bias(_bias(site, model), p)
        return torch.from_numpy(self.host.apply(_array(x), _array(weight), _array(bias)))


def _weight(site: Site, model: nn.Module) -> Tensor:
    assert site.weight is not None
    return site.present(model.get_parameter(site.weight).detach())


def _bias(site: Site, model: nn.Module) -> Tensor:
    found = read_bias(site, model)
    return torch.zeros(site.out_features, dtype=torch.float64) if found is None else found


def _array(tensor: Tensor) -> Array:
    """A tensor as an array, floating point in float64."""
    wide = tensor.detach().double() if tensor.is_floating_point() else tensor.detach()
    return wide.numpy()
