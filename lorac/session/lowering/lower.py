"""Lower a session's model, or a stored program, to the level that its target, or torch's own tools, ask for."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from lorac.errors import ChoiceError, CompileError, Unavailable
from lorac.frontend.capture.encoder_decoder import divide_sites, split_encoder_decoder
from lorac.frontend.capture.export import capture_graph
from lorac.frontend.capture.feature_towers import split_tower
from lorac.frontend.components import (
    Components,
    check_component,
    get_component_prefix,
    get_encoder_graph_name,
    list_components,
)
from lorac.frontend.host import Host
from lorac.frontend.weight_reads import find_graph_reads
from lorac.ir.graph.attention_ops import IDS
from lorac.ir.graph.feeds import collect_slot_tensors, select_reached_plans
from lorac.ir.graph.graph import Graph, Program, SlotInput
from lorac.ir.graph.nodes import SLOTS_KEYWORD
from lorac.ir.graph.passes import run_pipeline
from lorac.ir.sites.site import SiteKind
from lorac.ir.slots.choice import Choice
from lorac.ir.slots.composition import compose_choice, fill_slots
from lorac.ir.slots.places import as_place
from lorac.ir.slots.program_values import list_tapped_modules
from lorac.passes.insert import check_adapters_reached
from lorac.passes.pipelines import lowering_passes
from lorac.report.pass_history import PassHistory
from lorac.session.lowering.cache_check import CacheCheck
from lorac.session.lowering.capture_check import check_capture, check_runnable
from lorac.session.session import Session
from lorac.session.targets import find_backend


def lower_model(session: Session, aux: tuple[str, ...]) -> Program:
    """Capture a session's model graph by graph, check each against the model, and lower it.

    Args:
        session: the session of the model.
        aux: names of the extra outputs.
    """
    model, options = session.host.module, session.options
    graphs: dict[str, Graph] = {}
    for name, component in list_components(model).items():
        host = Host.of(component)
        inputs = session.precision.fit(find_component_example(session, "example_inputs", name))
        parts = split_tower(host, inputs) if options.uses_cache else None
        host, inputs = (host, inputs) if parts is None else parts[0]
        graph = _capture_component(session, name, host, inputs, grows=options.uses_cache)
        session.reads.note(name, *find_graph_reads(graph, model))
        if session.reads.only_read.issuperset(graph.plans):  # the adapters act in other components
            unused = (*graph.interface.unused_sites, *graph.plans)
            graph.interface, graph.plans = dataclasses.replace(graph.interface, unused_sites=unused), {}
        check_capture(graph, host, tested=options.self_test)
        cache_check = CacheCheck(graph) if options.uses_cache and options.self_test else None
        halves = split_encoder_decoder(graph, get_encoder_graph_name(name)) if options.uses_cache else (graph,)
        encoder = None
        if parts is not None:
            tower, images = parts[1]
            encoder = _capture_component(session, name, tower, images, grows=False)
            encoder.name = get_encoder_graph_name(name)
            check_capture(encoder, tower, tested=options.self_test)
            divide_sites(encoder, halves[0])
            table: Any = host.model.get_input_embeddings()  # type: ignore[operator]  # of transformers
            halves[0].interface = dataclasses.replace(halves[0].interface, id_counts={IDS: len(table.weight)})
        for half in halves:
            _run_passes(session, half, aux)
        if cache_check is not None:
            cache_check.check(halves, session.base)
        if encoder is not None:
            _run_passes(session, encoder, aux)
            halves = (halves[0], encoder)
        graphs |= {half.name: half for half in halves}
    check_adapters_reached(graphs.values(), {name: prepared.paths for name, prepared in session.pool.items()})
    return Program(graphs)


def lower_stored(session: Session, program: Program, aux: tuple[str, ...]) -> Program:
    """Lower an artifact's program, which is at level expanded; its graphs are changed in place."""
    for graph in program.graphs.values():
        _run_passes(session, graph, aux)
    return program


def list_missing_ops(session: Session, target: str) -> tuple[str, ...]:
    """Return the ops of a session's model that another target does not compute, without building an engine for it.

    Raises:
        Unavailable: the model is no longer in memory.
    """
    if not session.host.in_memory:
        raise Unavailable(
            "explain(target=...) needs the model, which this program no longer holds",
            next_step="compile with target='eager', whose explain(target=...) tells what another target lacks",
        )
    other = retarget(session, target)
    return other.backend.list_unsupported(lower_model(other, ()))


def retarget(session: Session, target: str) -> Session:
    """Return a session for the same model and adapters on another target, with a new history of passes."""
    backend = find_backend(target)
    options = backend.parse_options({"self_test": False, "aux": session.options.aux})
    ranks_at = backend.dialect_for(options).ranks_at
    plans = {path: dataclasses.replace(plan, ranks=ranks_at(plan.site)) for path, plan in session.plans.items()}
    return dataclasses.replace(session, backend=backend, options=options, plans=plans, history=PassHistory())


def _capture_component(session: Session, name: str, host: Host, inputs: object, *, grows: bool) -> Graph:
    model, sites, plans = session.host.module, session.sites, session.plans
    prefix = get_component_prefix(model, name)
    read = [path for path in (*plans, *list_tapped_modules(plans.values())) if path.startswith(prefix)]
    # Mark the exits of blocks, and of modules that are no sites and whose values branches read.
    marked = [path for path in read if path not in sites or sites[path].kind is SiteKind.BLOCK]
    traits = session.traits.get(name)
    if session.options.uses_cache and traits and traits.rules and traits.settings.get("is_encoder_decoder"):
        from lorac.runtime.generation.encoder_decoder_driver import load_rules_class

        load_rules_class(traits.rules)  # a model that generates in another way has no use for a cache
    try:
        return capture_graph(
            name,
            host,
            inputs,
            find_component_example(session, "dynamic_shapes", name),
            sites=sites,
            plans=plans,
            blocks=list(dict.fromkeys(marked)),
            prefix=prefix,
            grows=grows,
            observe=session.history.record,
        )
    except CompileError:
        check_runnable(host, inputs)
        raise


def find_component_example(session: Session, argument: str, name: str) -> object:
    """Return a component's part of ``example_inputs`` or ``dynamic_shapes``; for a single model, the whole."""
    given, model = session.examples.get(argument), session.host.module
    if given is None or not isinstance(model, Components):
        return given
    if not isinstance(given, Mapping) or not given.keys() <= set(model):
        raise ChoiceError(
            f"{argument}= is needed by component",
            next_step=f"give {argument}={{...}} with {', '.join(model)} as its keys",
        )
    return given.get(name)


def _run_passes(session: Session, graph: Graph, aux: tuple[str, ...]) -> None:
    dialect = session.backend.dialect_for(session.options)
    rows = dialect.rows and session.mode == "live"
    passes = lowering_passes(dialect, aux, constant=session.mode == "baked", rows=rows)
    run_pipeline(graph, passes, session.history.record)
    session.history.skips[graph.name] = graph.skips


_TARGET = "aoti"
"""The target whose graphs torch's tools take."""


def export_program(session: Session, choice: Choice, component: str) -> ExportedProgram:
    """Return a graph of a session's model as a program of aten ops (``Compiled.export_program``)."""
    from lorac.backends.aoti.dialect import make_plain_program

    other = retarget(session, _TARGET)
    graphs = lower_model(other, session.options.aux).graphs
    graph = graphs[check_component(component, graphs)]
    filled = fill_slots(graph.plans, compose_choice(other.plans, session.pool, choice, session.base), session.base)
    slots = collect_slot_tensors(graph.slots, graph.plans, filled)
    return make_plain_program(graph, slots, constant=session.mode == "baked")


def program_slots(session: Session, program: ExportedProgram, choice: Choice) -> dict[str, Tensor]:
    """Return the tensors of a choice for the slots of an exported program (``Compiled.program_slots``)."""
    _, named = program.example_inputs or ((), {})
    examples: Mapping[str, Tensor] = {**named}.get(SLOTS_KEYWORD, {})
    places = {name: name.rpartition(":") for name in examples}
    slots = {name: SlotInput(name, path, role, node="") for name, (path, _, role) in places.items()}
    plans = retarget(session, _TARGET).plans
    reached = select_reached_plans(slots, plans)
    filled = fill_slots(reached, compose_choice(plans, session.pool, choice, session.base), session.base)
    tensors = collect_slot_tensors(slots, reached, filled)
    return {
        name: tensor if tensor.dim() == examples[name].dim() else as_place(tensor, by_token=slots[name].by_token)
        for name, tensor in tensors.items()
    }
