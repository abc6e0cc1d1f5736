"""Open a session: copy the model if that is needed, load the adapters, plan the sites."""

from __future__ import annotations

from collections.abc import Mapping

from lorac.errors import ChoiceError
from lorac.frontend.components import Components
from lorac.ir.slots.choice import Choice, ChoiceSpec, parse_choice
from lorac.ir.slots.planning import plan_sites
from lorac.runtime.traits import collect_traits
from lorac.session.adapter_loading import make_adapter
from lorac.session.host_model import HostModel
from lorac.session.request.compile_request import CompileRequest
from lorac.session.request.placement import resolve_placement
from lorac.session.request.precision import prepare_model
from lorac.session.request.sources import ModelSource
from lorac.session.session import Session


def open_session(source: ModelSource, request: CompileRequest) -> Session:
    """Return a session with the model and its adapters, its sites planned."""
    module = Components(source.model) if isinstance(source.model, Mapping) else source.model
    options, model_device = resolve_placement(request.backend, request.options, request.device, module)
    dialect = request.backend.dialect_for(options)
    model, precision = prepare_model(module, dialect, request.dtype, model_device)
    host = HostModel(model, source.model, {"dtype": request.dtype, "device": request.device})
    session = Session.over(host, request.backend, options, "live" if request.mode == "auto" else request.mode)
    examples = request.example_inputs if request.dtype is None else precision.fit(request.example_inputs)
    session.examples = {"example_inputs": examples, "dynamic_shapes": request.dynamic_shapes}
    session.precision, session.traits = precision, collect_traits(model)
    session.quantise_sites()
    names = {name for name, _ in request.sources}
    for name, given in (*(named for named in source.adapters if named[0] not in names), *request.sources):
        adapter = make_adapter(session, given, name)
        session.pool.add(adapter, session.pool.prepare(adapter))
    session.plans = plan_sites(session.sites, session.pool, request.mode, request.reserve, dialect.ranks_at)
    return session


def resolve_active(session: Session, source: ModelSource, request: CompileRequest) -> Choice:
    """Return the choice that is active first: the given one, that of a PeftModel, the only adapter, or none.

    Raises:
        AdapterNotFound, ChoiceError: the choice makes no sense, or mode "baked" needs one.
    """
    active: ChoiceSpec = request.active if request.active != "auto" or request.sources else source.active
    names = list(session.pool)
    if active != "auto":
        return parse_choice(active, names)
    if len(names) == 1:
        return parse_choice(names[0], names)
    if session.mode == "baked" and names:
        raise ChoiceError(
            f"baking needs one choice among the adapters {', '.join(sorted(names))}",
            next_step="give active=, as swap() takes it",
        )
    return ()
