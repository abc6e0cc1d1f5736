"""``compile`` and ``load``: the only module that knows all the others."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorac.errors import ChoiceError, MissingExtra, UnknownOption, nearest_name
from lorac.formats import load_adapter
from lorac.ir.adapted import LiveTerm
from lorac.ir.choice import Active, Choice, Spec, parse_choice
from lorac.ir.engine import BuildRequest, Engine
from lorac.ir.graph import Graph
from lorac.ir.normal import BRANCH
from lorac.ir.sites import Site, find_sites
from lorac.ir.slots import BranchFill, Prepared, SitePlan
from lorac.ir.snapshot import BaseReader, compose_choice
from lorac.passes.fresh import fresh_adapter, parameter_sites, trainable
from lorac.passes.normal_forms import Lowerer, branch_term
from lorac.passes.pipelines import adapt, run_pipeline
from lorac.passes.plan import Reserve, plan_sites
from lorac.runtime.compiled import Compiled, Services
from lorac.runtime.module import CompiledModule
from lorac.runtime.pool import Pool
from lorac.variants.base import Adapter, Variant

TARGETS = {"eager": None, "onnxruntime": None, "tensorrt": "tensorrt"}
"""Targets there are, and the extra each needs."""
Source = str | Path | Adapter | Variant


def compile(  # noqa: A001, PLR0913  (the interface of DESIGN 2)
    model: nn.Module | Mapping[str, nn.Module],
    adapters: Mapping[str, Source] | Iterable[Source] = (),
    target: str = "eager",
    example_inputs: Any = None,
    mode: str = "auto",
    active: Any = "auto",
    reserve: Reserve | None = None,
    dynamic_shapes: Any = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> Compiled:
    """Compile a model and its adapters for a target.

    Args:
        model: an nn.Module, or several by name; left as it was: weights, flags, hooks, mode, random state.
        adapters: paths, Adapters, or fresh Variants (to train), by name or as a list.
        target: ``"eager"``, ``"onnxruntime"`` or ``"tensorrt"``.
        example_inputs: tuple or dict; default: made from the model's main input and config.
        mode: ``"live"``, ``"fused"``, ``"baked"`` or ``"auto"``.
        active: what ``swap`` takes; ``"auto"``: the only adapter at strength 1, or None if there are several.
        reserve: room for adapters added later; default: the given adapters' sites.
        dynamic_shapes: as torch.export's; default: batch, and length for text.
        dtype, device: default: the model's.
        **options: fields of the target's options.

    Raises:
        LoracError: a subclass, see ``lorac.errors``.
    """
    host = nn.ModuleDict(dict(model)) if isinstance(model, Mapping) else model
    backend, backend_options = _backend(target, options)
    return _Compilation(backend.host_for(_moved(host, dtype, device))).run(
        backend, backend_options, _named(adapters), target, example_inputs, mode, active, reserve, dynamic_shapes
    )


class _Compilation:
    """One compilation: the host, its sites, and the lowering of its adapters."""

    def __init__(self, host: nn.Module) -> None:
        self.host = host
        self.sites: dict[str, Site] = find_sites(self.host)
        self.base = BaseReader(self._weight, self._bias)
        self.lowerer = Lowerer(self.sites, self.base)
        self.pool = Pool(self.prepare)

    def run(  # noqa: PLR0913  (compile's own arguments)
        self,
        backend: Any,
        options: Any,
        sources: Sequence[tuple[str | None, Source]],
        target: str,
        example_inputs: Any,
        mode: str,
        active: Any,
        reserve: Reserve | None,
        dynamic_shapes: Any,
    ) -> Compiled:
        for name, source in sources:
            adapter = self.load(source, name)
            self.pool.put(adapter, self.pool.prepare(adapter))
        plans = plan_sites(self.sites, self.pool, mode, reserve)
        choice = self._choice(active, mode)
        kind = "live" if mode == "auto" else mode
        request = BuildRequest(
            model=self.host,
            sites=self.sites,
            plans=plans,
            base=self.base,
            mode=kind,
            snapshot=compose_choice(plans, self.pool, parse_choice(choice, self.pool), self.base),
            example_inputs=example_inputs,
            dynamic_shapes=dynamic_shapes,
            options=options,
            terms=self.terms,
            lower=_lower,
        )
        engine = backend.build(request)
        return self._assemble(engine, plans, kind, choice, target)

    def load(self, source: Source, name: str | None) -> Adapter:
        """An adapter of this compilation's own from a path, an Adapter or a fresh Variant."""
        if isinstance(source, Variant):
            adapter = fresh_adapter(source, name or source.name, self.host, self.sites, self.base)
        elif isinstance(source, Adapter):
            adapter = dataclasses.replace(source, name=name or source.name)
        else:
            adapter = load_adapter(source, self.host, name)
        self.pool.refuse_taken(adapter.name)
        self.lowerer.sites = self.sites = {**self.sites, **parameter_sites(self.host, adapter, self.sites)}
        self.lowerer.check(adapter)
        return trainable(adapter, self.sites)

    def prepare(self, adapter: Adapter) -> Prepared:
        """An adapter's normal forms."""
        with torch.no_grad():
            return self.lowerer.prepare(adapter)

    def terms(self, path: str, choice: Choice) -> Sequence[LiveTerm] | None:
        """The active terms of a site from the adapters' own tensors; None where none of them needs gradients."""
        adapters = self.pool.adapters
        found = [term for name, how in choice for term in self._terms_of(adapters[name], path, how)]
        return found or None

    def _terms_of(self, adapter: Adapter, path: str, how: Active) -> list[LiveTerm]:
        site = self.sites[path]
        rate = float(getattr(adapter.variant, "dropout", 0.0))
        place = adapter.variant.dropout_place
        tensors = adapter.tensors.get(path)
        if tensors is None:
            value = self.lowerer.replaced_value(adapter, site)
            return [] if value is None else [LiveTerm(how.strength, value)]
        lowering = self.lowerer.lowering(adapter.variant, site, tensors)
        if lowering.form == BRANCH:
            term = branch_term(adapter.variant, site, tensors, detach=False)
            strength = next(t for t in term.params if t.is_floating_point()).new_full((1,), how.strength)
            return [LiveTerm(how.strength, branch=(term.slot, BranchFill(strength, term.params)))]
        value = self.lowerer.value(lowering, site, tensors)
        value = self.lowerer.with_bias(adapter, site, value)
        return [LiveTerm(how.strength, value, rate=rate, place=place)]

    def _assemble(
        self, engine: Engine, plans: Mapping[str, SitePlan], mode: str, choice: Spec, target: str
    ) -> Compiled:
        compiled = CompiledModule(engine.module) if target == "eager" else Compiled()  # type: ignore[attr-defined]
        services = Services(
            load=self.load,
            prepare=self.prepare,
            recompile=self.recompile,
            save=_save,
            explain=_explain,
        )
        compiled.setup(
            engine=engine,
            plans=plans,
            sites=self.sites,
            base=self.base,
            pool=self.pool,
            services=services,
            mode=mode,
        )
        for adapter in self.pool.adapters.values():
            compiled.registered(adapter)
        if mode == "baked":
            compiled.mark_baked(parse_choice(choice, self.pool))
        elif choice is not None:
            compiled.swap(choice)
        return compiled

    def recompile(self, compiled: Compiled, target: str, mode: str, **options: Any) -> Compiled:
        """Compile again from the host, with the adapters' present tensors and the same active choice."""
        options.setdefault("active", compiled.active or None)
        return compile(self.host, dict(compiled.adapters), target=target, mode=mode, **options)

    def _choice(self, active: Any, mode: str) -> Spec:
        names = list(self.pool)
        if active != "auto":
            parse_choice(active, self.pool)
            return active  # type: ignore[no-any-return]
        if len(names) == 1:
            return names[0]
        if mode == "baked" and names:
            raise ChoiceError(
                f"baking needs one choice among the adapters {', '.join(sorted(names))}",
                next_step="give active=, as swap() takes it",
            )
        return None

    def _weight(self, site: Site) -> torch.Tensor:
        assert site.weight is not None
        return site.present(self.host.get_parameter(site.weight).detach())

    def _bias(self, site: Site) -> torch.Tensor | None:
        return self.host.get_parameter(site.bias).detach() if site.bias else None


def _lower(graph: Graph, aux: tuple[str, ...]) -> None:
    run_pipeline(graph, adapt(aux))


def _named(adapters: Mapping[str, Source] | Iterable[Source]) -> list[tuple[str | None, Source]]:
    if isinstance(adapters, Mapping):
        return list(adapters.items())
    if isinstance(adapters, str | Path | Adapter | Variant):
        return [(None, adapters)]
    return [(None, source) for source in adapters]


def _backend(target: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    if target not in TARGETS:
        raise UnknownOption(
            f"there is no target '{target}'", nearest=nearest_name(target, TARGETS) or ", ".join(TARGETS)
        )
    try:
        backend = importlib.import_module(f"lorac.backends.{target}")
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or target, TARGETS[target] or target) from error
    known = [field.name for field in dataclasses.fields(backend.Options)]
    for name in options:
        if name not in known:
            raise UnknownOption(
                f"target '{target}' has no option '{name}'",
                nearest=nearest_name(name, known),
                next_step=f"it takes {', '.join(known) or 'none'}",
            )
    return backend, backend.Options(**options)


def _moved(host: nn.Module, dtype: torch.dtype | None, device: Any) -> nn.Module:
    if dtype is None and device is None:
        return host
    return copy.deepcopy(host).to(device=device, dtype=dtype)


def _save(compiled: Compiled, folder: Any) -> None:
    from lorac.runtime import artifact

    artifact.save(compiled, folder)


def _explain(compiled: Compiled) -> Any:
    from lorac.analysis.explain import explain

    return explain(compiled)

