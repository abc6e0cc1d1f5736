"""One compilation: adapters are read, lowered and planned, a backend builds, and the parts become a ``Compiled``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorac.adapters.fresh import fresh_adapter, parameter_sites, trainable
from lorac.adapters.preparing import Preparer, branch_term
from lorac.errors import (
    BaseNeeded,
    ChoiceError,
)
from lorac.formats import load_adapter, save_adapter
from lorac.ir.algebra.changes import LowRank
from lorac.ir.algebra.reduction import BRANCH
from lorac.ir.engine import BuildRequest, Engine
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.signature import CallSignature
from lorac.ir.host.sites import BaseReader, Site, find_sites, stored_tensor
from lorac.ir.lowered import lowered
from lorac.ir.slots.choice import Active, Choice, Spec, parse_choice
from lorac.ir.slots.planning import Reserve, plan_sites
from lorac.ir.slots.site import BranchFill, Prepared, SitePlan
from lorac.ir.slots.snapshot import compose_choice
from lorac.ir.slots.training import LiveTerm
from lorac.ir.store.tensors import TensorFile, file_base
from lorac.ir.view.dump import Dump
from lorac.passes.insert import refuse_idle
from lorac.passes.pipelines import adapt, run_pipeline
from lorac.runtime import artifact
from lorac.runtime.compiled import Compiled, Services
from lorac.runtime.graphs import Stages
from lorac.runtime.host import Host
from lorac.runtime.module import compiled_module
from lorac.runtime.pool import Pool
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant

Source = str | Path | Adapter | Variant
"""What an adapter can be given as."""


class Compilation:
    """One compilation: the host, its sites, and the reduction of its adapters.

    Args:
        host: the host model, or what an artefact has of it.
        again: ``lorac.compile``, to compile again from the host.
        base: reads base weights; default: the host's.
    """

    def __init__(self, host: Host, again: Callable[..., Compiled], base: BaseReader | None = None) -> None:
        self.host, self.again = host, again
        self.sites: dict[str, Site] = find_sites(host.module)
        self.base = base or BaseReader(self._weight, self._bias)
        self.preparer = Preparer(self.sites, self.base)
        self.pool = Pool(self.prepare)
        self.request: BuildRequest | None = None
        self.examples: dict[str, Any] = {}
        self._stages = Stages()
        self.casts: tuple[tuple[torch.dtype, torch.dtype], ...] = ()

    def run(  # noqa: PLR0913  (compile's own arguments)
        self,
        *,
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
            self.register(self.load(source, name))
        plans = plan_sites(self.sites, self.pool, mode, reserve)
        choice = self._choice(active, mode)
        kind = "live" if mode == "auto" else mode
        self.examples = {"example_inputs": example_inputs, "dynamic_shapes": dynamic_shapes}
        request = self.requested(plans, kind, choice, options, example_inputs, dynamic_shapes)
        return self.finish(backend, backend.build(request), request, choice)

    def requested(
        self,
        plans: Mapping[str, SitePlan],
        mode: str,
        choice: Spec,
        options: Any,
        example_inputs: Any = None,
        dynamic_shapes: Any = None,
        lowered: tuple[Graph, CallSignature] | None = None,
    ) -> BuildRequest:
        """The request for a backend."""
        return BuildRequest(
            model=self.host.module,
            sites=self.sites,
            plans=plans,
            base=self.base,
            mode=mode,
            snapshot=compose_choice(plans, self.pool, parse_choice(choice, self.pool), self.base),
            example_inputs=example_inputs,
            dynamic_shapes=dynamic_shapes,
            options=options,
            terms=self.terms,
            lower=self.lower,
            lowered=lowered,
        )

    def finish(self, backend: Any, engine: Engine, request: BuildRequest, choice: Spec) -> Compiled:
        """The compiled model over a built engine. What the engine does not need of the host is let go."""
        if engine.folder is None:
            self.request = request
        else:
            file = TensorFile(backend.base_file(engine.folder))
            self.host.let_go(file)
            self.base = self.preparer.base = file_base(file)
        return self.assemble(backend, engine, request.plans, request.mode, choice)

    def register(self, adapter: Adapter) -> None:
        """Prepare an adapter and put it into the pool."""
        self.pool.put(adapter, self.pool.prepare(adapter))

    def load(self, source: Source, name: str | None) -> Adapter:
        """An adapter of this compilation's own from a path, an Adapter or a fresh Variant."""
        model = self.host.module
        try:
            adapter = self._read(source, name, model)
        except NotImplementedError as error:  # a weight on the meta device: the file holds a copy to compare with
            raise _not_kept(name or str(source)) from error
        self.pool.refuse_taken(adapter.name)
        if any(tensor.is_meta for tensor in adapter.parameters()):
            raise _not_kept(adapter.name)
        self.preparer.sites = self.sites = {**self.sites, **parameter_sites(model, adapter, self.sites)}
        self.preparer.check(adapter)
        return trainable(adapter, self.sites)

    def _read(self, source: Source, name: str | None, model: nn.Module) -> Adapter:
        if isinstance(source, Variant):
            return fresh_adapter(source, name or source.name, model, self.sites, self.base)
        if isinstance(source, Adapter):
            return dataclasses.replace(source, name=name or source.name)
        return load_adapter(source, model, name)

    def prepare(self, adapter: Adapter) -> Prepared:
        """An adapter's normal forms."""
        with torch.no_grad():
            return self.preparer.prepare(adapter)

    def outline(self, adapter: Adapter) -> Prepared:
        """An adapter's normal forms with their shapes alone, for sites whose base weight is not kept."""

        def ones(site: Site) -> torch.Tensor:
            return torch.ones(site.out_features, site.in_features, dtype=site.dtype)

        def bias(site: Site) -> torch.Tensor | None:
            return torch.zeros(site.out_features, dtype=site.dtype) if site.bias else None

        with torch.no_grad():
            return Preparer(self.sites, BaseReader(ones, bias)).prepare(adapter)

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
            change = self.preparer.replaced_change(adapter, site)
            return [] if change is None else [LiveTerm(how.strength, change)]
        reduction = self.preparer.reduction(adapter.variant, site, tensors)
        if reduction.form == BRANCH:
            term = branch_term(adapter.variant, site, tensors, detach=False)
            strength = next(t for t in term.params if t.is_floating_point()).new_full((1,), how.strength)
            return [LiveTerm(how.strength, branch=(term.slot, BranchFill(strength, term.params)))]
        change = self.preparer.change(reduction, site, tensors)
        if how.rank is not None and isinstance(change, LowRank):
            change = change.truncated(how.rank, adapter.variant.truncatable or 0.0)
        change = self.preparer.with_bias(adapter, site, change)
        return [LiveTerm(how.strength, change, rate=rate, place=place)]

    def assemble(
        self, backend: Any, engine: Engine, plans: Mapping[str, SitePlan], mode: str, choice: Spec
    ) -> Compiled:
        """The compiled model over an engine, with a choice active."""
        module = getattr(engine, "module", None)
        compiled = Compiled() if module is None else compiled_module(module)
        services = Services(
            load=self.load,
            outline=self.outline,
            recompile=self.recompile,
            save=functools.partial(self.save, backend),
            explain=_explain,
            stages=self.stages,
            reasons=self.reasons,
            casts=self.casts,
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

    def lower(self, graph: Graph, aux: tuple[str, ...]) -> None:
        """Run the passes that bring a captured graph to level expanded, and note what each changed."""
        run_pipeline(graph, adapt(aux), self._stages.record)
        refuse_idle(graph, {name: prepared.paths for name, prepared in self.pool.items()})

    def stages(self) -> Mapping[str, Mapping[str, Dump]]:
        """How the graphs looked after each pass; a host that runs as it is is captured for it now."""
        if not self._stages.dumps and self.request is not None and self.request.lowered is None:
            lowered(self.request, ())
        return self._stages.dumps

    def reasons(self, name: str, path: str) -> tuple[str, ...]:
        """Why an adapter's term at a site has no cheaper form."""
        adapter = self.pool.adapters[name]
        tensors = adapter.tensors.get(path)
        return () if tensors is None else self.preparer.reduction(adapter.variant, self.sites[path], tensors).reasons

    def save(self, backend: Any, compiled: Compiled, folder: Any) -> None:
        """Write an artefact of a compiled model of this compilation's."""

        def request() -> BuildRequest:
            assert self.request is not None
            return self.request

        artifact.save(
            compiled,
            folder,
            host=self.host.described,
            store=lambda staged: backend.store(compiled.engine, staged, request),
            save_adapter=functools.partial(save_adapter, format="native"),
        )

    def recompile(self, compiled: Compiled, target: str, mode: str, **options: Any) -> Compiled:
        """Compile again from the host, with the adapters' present tensors and the same active choice."""
        given, moved = self.host.original("export()")
        options = {"active": dict(compiled.choice) or None, **self.examples, **moved, **options}
        return self.again(given, dict(compiled.adapters), target=target, mode=mode, **options)

    def _choice(self, active: Any, mode: str) -> Spec:
        names = list(self.pool)
        if active != "auto":
            parse_choice(active, self.pool)
            return active
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
        return site.present(stored_tensor(self.host.module, site.weight).detach())

    def _bias(self, site: Site) -> torch.Tensor | None:
        return self.host.module.get_parameter(site.bias).detach() if site.bias else None


def _not_kept(adapter: str) -> BaseNeeded:
    return BaseNeeded(
        f"adapter '{adapter}' needs base weights that the engine does not keep",
        next_step="compile from the model again, with the adapter in adapters=",
    )


def _explain(compiled: Compiled) -> Any:
    from lorac.analysis.explain import explain

    return explain(compiled)
