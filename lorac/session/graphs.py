"""``compiled.graph``: the graphs of a compiled model at every stage."""

import functools
from collections.abc import Mapping

from torch import Tensor

from lorac.errors import Unavailable
from lorac.report.dump import Dump
from lorac.report.graph_views import GraphView, GraphViews
from lorac.report.pass_history import CAPTURE, EMITTED
from lorac.report.picture.page_data import PictureContext
from lorac.report.printer import AdapterNotes
from lorac.report.terms import describe_terms, describe_variant
from lorac.runtime.choice_switch import ChoiceSwitch
from lorac.session.lowering.lower import lower_model
from lorac.session.presentation import explain
from lorac.session.session import Session
from lorac.variants.adapter import Adapter


def collect_graphs(session: Session, switch: ChoiceSwitch) -> GraphViews:
    """Return the graphs of a compiled model; target "eager" captures its model now, in eval mode.

    A loaded model has only the program that its target runs.

    Raises:
        Unavailable: the model was loaded from an artifact, and its target runs no program.
        CaptureError, ExampleInputsNeeded: the model cannot be captured.
    """
    history = session.history
    if not history.stages and session.host.in_memory:
        lower_model(session, ())
    listing = functools.cache(switch.engine.dump)
    dumps: Mapping[str, Mapping[str, Dump]] = history.stages or {n: {EMITTED: dump} for n, dump in listing().items()}
    if not dumps:
        raise Unavailable(
            "the graph of a model that was loaded from an artifact is not kept",
            next_step="compile from the model to print it",
        )
    captured = [stages[CAPTURE] for stages in dumps.values() if CAPTURE in stages]
    calls = {site: count for dump in captured for site, count in dump.calls.items()}

    def context() -> PictureContext:
        adapters, snapshot = switch.pool.adapters, switch.state.snapshot
        notes = AdapterNotes(
            adapters={name: describe_variant(adapter.variant) for name, adapter in adapters.items()},
            terms=describe_terms(switch.prepared_adapters, session.plans, mode=switch.mode, snapshot=snapshot),
            trainable=_count_trainable(adapters),
            calls=calls,
        )
        # A tensor that several sites share counts once.
        values = {name: [t for t in a.parameters() if t.is_floating_point()] for name, a in adapters.items()}
        parameters = {name: sum(tensor.numel() for tensor in own) for name, own in values.items()}
        return PictureContext(explanation=explain(session, switch), notes=notes, parameters=parameters)

    def view(name: str) -> GraphView:
        skipped = {**history.skips.get(name, {}), **switch.engine.skipped.get(name, {})}
        return GraphView(dumps[name], context, skipped=skipped, emission=lambda: listing().get(name))

    return GraphViews({name: view(name) for name in dumps}, context)


def _count_trainable(adapters: Mapping[str, Adapter]) -> dict[str, int]:
    """Return for each site the number of values that train; a shared tensor counts at its first site."""
    counts: dict[str, int] = {}
    seen, found = set[int](), list[tuple[str, Tensor]]()
    for adapter in adapters.values():
        own = [(path, tensor) for path, tensors in adapter.tensors.items() for tensor in tensors.values()]
        found += [*own, *((name.rpartition(".")[0], tensor) for name, tensor in adapter.replaced.items())]
    for path, tensor in found:
        if tensor.requires_grad and id(tensor) not in seen:
            seen.add(id(tensor))
            counts[path] = counts.get(path, 0) + tensor.numel()
    return counts
