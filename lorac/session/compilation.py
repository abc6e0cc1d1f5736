"""One compilation: adapters are read and planned, a backend builds, and the parts become a ``Compiled``."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lorac.collecting import uncollected
from lorac.errors import CaptureError, ChoiceError
from lorac.frontend.capture.encoder_decoder import split_encoder_decoder
from lorac.frontend.capture.export import capture_graph
from lorac.frontend.components import Components, get_component_prefix, get_encoder_graph_name, list_components
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.program import Program
from lorac.ir.sites import Site, SiteKind
from lorac.ir.slots.choice import ChoiceSpec, parse_choice
from lorac.ir.slots.composition import compose_choice
from lorac.ir.slots.planning import Reserve, plan_sites
from lorac.ir.slots.plans import SitePlan
from lorac.ir.slots.program_values import list_tapped_modules
from lorac.passes.insert import check_adapters_reached
from lorac.passes.pipelines import lowering_passes, run_pipeline
from lorac.runtime.traits import collect_traits
from lorac.session.assembly import Assembly
from lorac.session.cache_check import CacheCheck
from lorac.session.capture_check import check_capture, check_runnable
from lorac.session.compiled import Compiled
from lorac.session.host_model import Again
from lorac.session.precision import Precision
from lorac.session.session import Session
from lorac.session.sources import NamedSource
from lorac.session.targets import find_backend
from lorac.target.engine import Backend, BuildRequest, TargetOptions

_UNCHANGED_PRECISION = Precision()


@dataclass(frozen=True, kw_only=True)
class CompileRequest:
    """What ``compile`` was asked for, beside the model and its adapters.

    Attributes:
        mode, active, reserve: as ``compile``'s.
        example_inputs, dynamic_shapes: as ``compile``'s, of a single model or by component.
        options: the target's options.
    """

    mode: str
    active: ChoiceSpec
    reserve: Reserve | None
    example_inputs: object
    dynamic_shapes: object
    options: TargetOptions


class Compilation:
    """One compilation of a host for a backend.

    Args:
        lasting: what lives on after it.
        backend: what builds.
        again: ``lorac.compile``, to compile again from the host.
        precision: what became of the model's dtype.
    """

    def __init__(
        self,
        lasting: Session,
        backend: Backend[TargetOptions],
        again: Again,
        precision: Precision = _UNCHANGED_PRECISION,
    ) -> None:
        self.lasting, self.backend, self.again, self.precision = lasting, backend, again, precision
        self.examples: dict[str, object] = {}

    @uncollected()
    def run(self, sources: Sequence[NamedSource], asked: CompileRequest) -> Compiled:
        """Everything from the adapters to a compiled model."""
        lasting = self.lasting
        lasting.examples = asked.example_inputs
        lasting.hold(self.backend.held(lasting.sites, asked.options, asked.mode))
        for name, source in sources:
            lasting.register(lasting.load(source, name))
        dialect = self.backend.dialect_for(asked.options)
        plans = plan_sites(lasting.sites, lasting.pool, asked.mode, asked.reserve, dialect.ranks_at)
        choice = self._choice(asked.active, asked.mode)
        self.examples = {"example_inputs": asked.example_inputs, "dynamic_shapes": asked.dynamic_shapes}
        mode = "live" if asked.mode == "auto" else asked.mode
        return self.built(plans, mode, choice, asked.options, None)

    @uncollected()
    def built(
        self,
        plans: Mapping[str, SitePlan],
        mode: str,
        choice: ChoiceSpec,
        options: TargetOptions,
        stored: Program | None,
    ) -> Compiled:
        """The compiled model over an engine that is built now.

        Args:
            plans, mode, choice, options: what to build.
            stored: the program at level expanded, where it comes from an artefact.
        """
        lasting = self.lasting
        model = lasting.host.module
        request = BuildRequest(
            model=model,
            sites=lasting.sites,
            plans=plans,
            base=lasting.base,
            mode=mode,
            snapshot=compose_choice(plans, lasting.pool, parse_choice(choice, lasting.pool), lasting.base),
            options=options,
            terms=lasting.terms,
            program=self._lowered(stored, mode, options)
            if stored is not None
            else self._captured_as(model, plans, mode, options),
        )
        engine = self.backend.build(request)
        if engine.files is None:
            lasting.request = request
        else:
            lasting.let_go(self.backend.base_of(engine.files))
        assembly = Assembly(
            lasting=lasting,
            backend=self.backend,
            again=self.again,
            precision=self.precision,
            traits=collect_traits(model),
            examples=self.examples,
            lacking=functools.partial(self._lacking, plans, mode) if engine.files is None else None,
        )
        return assembly.over(engine, plans, mode, choice)

    def _lacking(self, plans: Mapping[str, SitePlan], mode: str, target: str) -> tuple[str, ...]:
        """What another target would not compute, told by emitting for it; what passes do for that is not recorded."""
        lasting = copy.copy(self.lasting)
        vars(lasting).pop("stages", None)
        other = Compilation(lasting, find_backend(target), self.again, self.precision)
        other.examples = self.examples
        options = other.backend.told({"self_test": False})
        ranks = other.backend.dialect_for(options).ranks_at
        own = {path: dataclasses.replace(plan, ranks=ranks(plan.site)) for path, plan in plans.items()}
        return other.backend.lacking(other._program(lasting.host.module, own, mode, options, ()))

    def _choice(self, active: ChoiceSpec, mode: str) -> ChoiceSpec:
        names = list(self.lasting.pool)
        if active != "auto":
            parse_choice(active, names)
            return active
        if len(names) == 1:
            return names[0]
        if mode == "baked" and names:
            raise ChoiceError(
                f"baking needs one choice among the adapters {', '.join(sorted(names))}",
                next_step="give active=, as swap() takes it",
            )
        return None

    # --- the program -------------------------------------------------------------------------------------------

    def _captured_as(
        self, model: nn.Module, plans: Mapping[str, SitePlan], mode: str, options: TargetOptions
    ) -> Callable[[tuple[str, ...]], Program]:
        return functools.partial(self._program, model, plans, mode, options)

    def _program(
        self,
        model: nn.Module,
        plans: Mapping[str, SitePlan],
        mode: str,
        options: TargetOptions,
        aux: tuple[str, ...],
    ) -> Program:
        """The host captured graph by graph, held against it, and lowered as the target's dialect asks."""
        graphs: dict[str, Graph] = {}
        for name, component in list_components(model).items():
            graph = self._captured(name, model, component, plans, options.grows)
            check_capture(graph, component, tested=options.self_test)
            grown = CacheCheck(graph) if options.grows and options.self_test else None
            halves = split_encoder_decoder(graph, get_encoder_graph_name(name)) if options.grows else (graph,)
            for half in halves:
                self._lower(half, mode, options, aux)
            if grown is not None:
                grown.hold_against(halves, self.lasting.base)
            graphs |= {half.name: half for half in halves}
        check_adapters_reached(graphs.values(), {name: prepared.paths for name, prepared in self.lasting.pool.items()})
        return Program(graphs)

    def _captured(
        self, name: str, model: nn.Module, component: nn.Module, plans: Mapping[str, SitePlan], grows: bool
    ) -> Graph:
        prefix, sites = get_component_prefix(model, name), self.lasting.sites
        marked = [
            path
            for path in (*plans, *list_tapped_modules(plans.values()))
            if path.startswith(prefix) and _marks_exit(path, sites)
        ]
        inputs = self.precision.fit(self._example("example_inputs", model, name))
        try:
            return capture_graph(
                name,
                component,
                inputs,
                self._example("dynamic_shapes", model, name),
                sites=sites,
                plans=plans,
                blocks=list(dict.fromkeys(marked)),
                prefix=prefix,
                grows=grows,
            )
        except CaptureError:
            check_runnable(component, inputs)
            raise

    def _example(self, what: str, model: nn.Module, name: str) -> object:
        """What was given for one component; of a single model all of it."""
        given = self.examples.get(what)
        if given is None or not isinstance(model, Components):
            return given
        if not isinstance(given, Mapping) or not given.keys() <= set(model):
            raise ChoiceError(
                f"{what}= is not by component", next_step=f"give {what}={{...}} with {', '.join(model)} as its keys"
            )
        return given.get(name)

    def _lowered(self, stored: Program, mode: str, options: TargetOptions) -> Callable[[tuple[str, ...]], Program]:
        return functools.partial(self._from_stored, stored, mode, options)

    def _from_stored(self, stored: Program, mode: str, options: TargetOptions, aux: tuple[str, ...]) -> Program:
        """A program from an artefact, brought from level expanded to what the target's dialect asks."""
        for graph in stored.graphs.values():
            self._lower(graph, mode, options, aux)
        return stored

    def _lower(self, graph: Graph, mode: str, options: TargetOptions, aux: tuple[str, ...]) -> None:
        stages = self.lasting.stages
        passes = lowering_passes(self.backend.dialect_for(options), aux, constant=mode == "baked")
        outcomes = run_pipeline(graph, passes, stages.record)
        stages.skips[graph.name] = {name: outcome.skipped for name, outcome in outcomes if outcome.skipped}


def _marks_exit(path: str, sites: Mapping[str, Site]) -> bool:
    """Whether the exit of what a path names is to be marked: of a block, and of a module that is only read."""
    return path not in sites or sites[path].kind is SiteKind.BLOCK
