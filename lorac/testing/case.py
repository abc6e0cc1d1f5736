"""A variant on a host, with the adapters, compiled models and references that its checks share."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorac.adapters.factors import factors
from lorac.frontend.base_weights import read_bias
from lorac.frontend.site_discovery import find_sites
from lorac.ir.sites.site import Site
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
from lorac.session.compiled import Compiled, CompiledModule
from lorac.testing.hosts import ConformanceHost
from lorac.testing.parity import contribution
from lorac.testing.samples import AIM, adapter_away
from lorac.variants.adapter import Adapter
from lorac.variants.base import BranchVariant, Variant, WeightVariant

Array = np.ndarray


@dataclass(frozen=True)
class Oracle:
    """A method's equations in NumPy float64, written from its paper, without looking at the variant.

    ``p`` has one array per parameter, and ``variant`` is the configuration at the site. Give the functions that the
    method has. ``p.values`` has program values by name, ``p.site`` is the site's path, and ``p.passing`` the name of
    the adapter's own pass, or empty.

    Attributes:
        weight: (W (out, in), p, variant) -> W'.
        bias: (b (out,), W, p, variant) -> b'; zeros stand for a missing bias.
        branch: (x, y, p, variant) -> y', where y is the site's unadapted output.
        once: (p, variant) -> the results of the method's ``once``, read as ``own:<name>``.
        count: (out, in, variant) -> number of trained values at one site.
    """

    weight: Callable[..., Array] | None = None
    bias: Callable[..., Array] | None = None
    branch: Callable[..., Array] | None = None
    count: Callable[..., int] | None = None
    once: Callable[..., dict[str, Array]] | None = None

    @staticmethod
    def of(module: ModuleType) -> "Oracle":
        """Return the oracle of a module's functions with these names."""
        names = [field.name for field in dataclasses.fields(Oracle)]
        return Oracle(**{name: vars(module)[name] for name in names if name in vars(module)})


class Case:
    """Shared objects of the checks of one variant on one host, each made on first use.

    Args:
        variant: the configuration to test.
        oracle: the method's equations, or None.
    """

    def __init__(self, variant: Variant, host: ConformanceHost, oracle: Oracle | None = None) -> None:
        self.given, self.host, self.oracle = variant, host, oracle

    @cached_property
    def variant(self) -> Variant:
        """The configuration for the host's sites; an unsupported one only with their paths as targets."""
        admitted = self.host.admits(self.given)
        return self.host.fit(self.given) if admitted else dataclasses.replace(self.given, targets=self.host.paths)

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
        """An adapter away from its start values."""
        return adapter_away(self.variant, self.model, self.x, name="a", seed=1)

    @cached_property
    def b(self) -> Adapter:
        """Another such adapter."""
        return adapter_away(self.variant, self.model, self.x, name="b", seed=2)

    @property
    def x(self) -> Tensor:
        """The input of checks that need only one."""
        return self.host.inputs(self.host.batches[0])

    @cached_property
    def live(self) -> Compiled:
        """Adapter a, live, in eager float64."""
        return compile(self.model, {"a": self.a}, mode="live")

    @cached_property
    def mergeable(self) -> bool:
        """Whether the method has a weight form here, as every method that edits weights does."""
        return not any(self.live.plans[path].branches for path in self.host.paths)

    @cached_property
    def fits_weights(self) -> bool:
        """Whether the model's own tensors can hold the change: layers without a bias hold no shift of it."""
        if not self.mergeable:
            return False
        changes = factors(self.a, self.model).items()
        return all(self.host.sites[path].bias or change.e is None or not change.e.any() for path, change in changes)

    @cached_property
    def model32(self) -> nn.Module:
        """The host in float32."""
        return copy.deepcopy(self.model).float()

    def compiled(self, *adapters: Adapter, **options: Any) -> CompiledModule:
        """Compile the float64 model with these adapters."""
        return compile(self.model, {adapter.name: adapter for adapter in adapters}, **options)

    def inputs(self, batch: tuple[int, ...]) -> Tensor:
        """Return an input with these batch dimensions; for none, the row of ``x`` nearest to the aim's contribution."""
        if batch:
            return self.host.inputs(batch)
        with torch.no_grad():
            pairs = zip(self.live(self.x), self.model(self.x), strict=True)
            shares = [contribution(row, base)["output"] for row, base in pairs]
        return self.x[int(np.argmin(np.abs(np.array(shares) - AIM)))]

    @torch.no_grad()
    def base(self, x: Tensor) -> Tensor:
        """Return the host's output."""
        return self.model(x)

    @torch.no_grad()
    def references(self, x: Tensor) -> dict[str, Tensor]:
        """Return the expected output of adapter a by each function of the oracle, or by the formula without one."""
        values = self._run_pass(self.model, x, self._initial_values(self.model, x), acts=False)[1]
        expected = self._expected(self.site, self.model, *self.observe(self.model, x), values)
        return {name: self.complete(x, y) for name, y in expected.items()}

    @torch.no_grad()
    def observe(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input and the output of the site in a call of the host, or of a compiled model.

        They are the model's own where it calls no module there: an attention multiplies by its output layer itself.
        """
        calls, host = list[tuple[Tensor, Tensor]](), model.host if isinstance(model, CompiledModule) else model
        hook = host.get_submodule(self.site.path).register_forward_hook(lambda _, args, y: calls.append((args[0], y)))
        with hook:
            output = model(x)
        return (calls or [(x, output)])[-1]

    @torch.no_grad()
    def complete(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the host's output where ``y``, of the shape that ``observe`` returns, is the site's output."""
        calls: list[nn.Module] = []

        def put(module: nn.Module, *_: object) -> Tensor:
            calls.append(module)
            return y

        hook = self.model.get_submodule(self.site.path).register_forward_hook(put)
        with hook:
            output: Tensor = self.model(x)
        return output if calls else y

    @torch.no_grad()
    def reference(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return the expected output of a model of several sites with adapter a.

        Args:
            model: the host, in float64.
            x: its input.
        """
        return self._run_pass(model, x, self._initial_values(model, x))[0]

    def _value_names(self, path: str) -> list[str]:
        """Return the names of the program values that the method reads at a site and in ``once``."""
        site = self.host.sites[path]
        variant = self.variant.at(site)
        if not isinstance(variant, BranchVariant):
            return []
        return [*variant.reads(site), *(variant.reads_once() if variant.has_once else ())]

    def _initial_values(self, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        """Return the program values that are known when a call of a model begins, by name."""
        names = list(dict.fromkeys(name for path in self.host.paths for name in self._value_names(path)))
        parsed, sites = {name: parse_value_name(name) for name in names}, find_sites(model)
        values = {name: _weight(sites[path], model) for name, (kind, path) in parsed.items() if kind == WEIGHT}
        bases = [path for kind, path in parsed.values() if kind == BASE]
        outputs = self._run_pass(model, x, values, acts=False)[1] if bases else {}
        values |= {f"{BASE}:{path}": outputs[path] for path in bases}
        for passing, paths in modules_by_pass(names).items():
            outputs = self._run_pass(model, x, values, passing=passing)[1]
            values |= {pass_value_name(passing, path): outputs[path] for path in paths}
        return values

    def _run_pass(
        self, model: nn.Module, x: Tensor, known: Mapping[str, Tensor], *, passing: str = "", acts: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run a model and return its output, and the program values with those read in this pass.

        Args:
            model: the host, in float64.
            x: its input.
            known: the values that are known from the start.
            passing: the name of an adapter's own pass.
            acts: whether adapter a is on.
        """
        values = dict(known)

        def adapt(site: Site) -> Callable[..., Tensor]:
            return lambda _, args, y: next(iter(self._expected(site, model, args[0], y, values, passing).values()))

        def record(path: str) -> Callable[..., None]:
            return lambda _, args, y: values.update({f"{IN}:{path}": args[0], path: y})

        adapted = self.host.sites if acts and self.a else {}  # the adapter is made before anything is hooked
        parsed = [parse_value_name(name) for path in self.host.paths for name in self._value_names(path)]
        read = dict.fromkeys(path for kind, path in parsed if kind in {OUTPUT, IN, BASE, PASS})
        functions = [(path, adapt(site)) for path, site in adapted.items()] + [(path, record(path)) for path in read]
        with contextlib.ExitStack() as hooks:
            for path, function in functions:
                hooks.enter_context(model.get_submodule(path).register_forward_hook(function))
            return model(x), values

    def _expected(
        self, site: Site, model: nn.Module, x: Tensor, y: Tensor, values: Mapping[str, Tensor], passing: str = ""
    ) -> dict[str, Tensor]:
        """Return the expected output of adapter a at a site, by each function of the oracle or by the formula.

        Args:
            model: the host, in float64.
            x: the site's input.
            y: the site's output in the host.
            values: the known program values by name.
            passing: the name of an adapter's own pass.
        """
        read = {name: values[name] for name in self._value_names(site.path) if name in values}
        if self.oracle is None:
            return {"formula": self._formula(site, model, x, y, read, passing)}
        expected = {}
        arrays = {name: _array(value) for name, value in read.items()}
        tensors = {name: _array(t) for name, t in self.a.tensors[site.path].items()}
        # A method's own tensor goes before these names.
        p = SimpleNamespace(**{"values": arrays, "site": site.path, "passing": passing, **tensors})
        variant = self.variant.at(site)
        if self.oracle.once is not None and not passing:
            arrays |= {f"{OWN}:{name}": value for name, value in self.oracle.once(p, variant).items()}
        if self.oracle.weight is not None:
            weight, bias = _array(_weight(site, model)), _array(_bias(site, model))
            new_weight = self.oracle.weight(weight, p, variant)
            if self.oracle.bias is not None:
                bias = self.oracle.bias(bias, weight, p, variant)
            expected["weight"] = torch.from_numpy(self.host.compute(_array(x), new_weight, bias))
        if self.oracle.branch is not None:
            expected["branch"] = torch.from_numpy(self.oracle.branch(_array(x), _array(y), p, variant))
        assert expected, "the oracle has neither weight() nor branch()"
        return expected

    @property
    def weight(self) -> Tensor:
        """W (out, in)."""
        return _weight(self.site, self.model)

    @property
    def bias(self) -> Tensor:
        """b (out,), zeros without a bias."""
        return _bias(self.site, self.model)

    def _formula(
        self, site: Site, model: nn.Module, x: Tensor, y: Tensor, read: Mapping[str, Tensor], passing: str
    ) -> Tensor:
        variant = self.variant.at(site)
        p = SimpleNamespace(**self.a.tensors[site.path])
        if isinstance(variant, BranchVariant):
            values = {program_value_name("", name): value for name, value in read.items()}
            context = FormulaContext(site, values=values, passing=passing).within(y.dtype)
            own = variant.once(p, context) if variant.has_once and not passing else {}
            values |= {program_value_name("", f"{OWN}:{name}"): value for name, value in own.items()}
            return variant.branch(x, y, p, context)
        assert isinstance(variant, WeightVariant)
        base, bias = _weight(site, model), _bias(site, model)
        weight, bias = variant.weight(base, p), variant.compute_bias(base, bias, p)
        return torch.from_numpy(self.host.compute(_array(x), _array(weight), _array(bias)))


def _weight(site: Site, model: nn.Module) -> Tensor:
    assert site.weight is not None
    return site.present(model.get_parameter(site.weight).detach())


def _bias(site: Site, model: nn.Module) -> Tensor:
    bias = read_bias(site, model)
    return torch.zeros(site.out_features, dtype=torch.float64) if bias is None else bias


def _array(tensor: Tensor) -> Array:
    """Convert a tensor to an array, floating point in float64."""
    wide = tensor.detach().double() if tensor.is_floating_point() else tensor.detach()
    return wide.numpy()
