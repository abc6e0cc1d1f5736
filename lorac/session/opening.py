"""Open a session for a request: copy the model where that is needed, load the adapters, plan the sites."""

from __future__ import annotations

from lorac.errors import ChoiceError
from lorac.frontend.parametrized_weights import materialize_weights
from lorac.frontend.quantised_weights import dequantise_weights
from lorac.ir.slots.choice import Choice, ChoiceSpec, parse_choice
from lorac.ir.slots.planning import plan_sites
from lorac.runtime.traits import collect_traits
from lorac.session.adapter_loading import make_adapter
from lorac.session.host_model import HostModel
from lorac.session.request.compile_request import CompileRequest
from lorac.session.request.precision import cast_model
from lorac.session.session import Session


def open_session(request: CompileRequest) -> Session:
    """Return a session with the request's model and adapters, its sites planned."""
    dialect = request.backend.dialect_for(request.options)
    model = materialize_weights(request.model)
    if dialect.emits:  # an emitted program cannot call the kernels of quantisation libraries
        model = dequantise_weights(model)
    model, precision = cast_model(model, dialect, request.dtype, request.model_device)
    precision.warn(dialect.name)
    host = HostModel(model, request.given, {"dtype": request.dtype, "device": request.device})
    session = Session.over(host, request.backend, request.options, "live" if request.mode == "auto" else request.mode)
    examples = request.example_inputs if request.dtype is None else precision.fit(request.example_inputs)
    session.examples = {"example_inputs": examples, "dynamic_shapes": request.dynamic_shapes}
    session.precision, session.traits = precision, collect_traits(model)
    session.quantise_sites()
    for name, source in request.sources:
        adapter = make_adapter(session, source, name)
        session.pool.add(adapter, session.pool.prepare(adapter))
    session.plans = plan_sites(session.sites, session.pool, request.mode, request.reserve, dialect.ranks_at)
    return session


def resolve_active(active: ChoiceSpec, session: Session) -> Choice:
    """Return the choice that is active first; ``"auto"``: the only adapter, or none if there are several.

    Raises:
        AdapterNotFound, ChoiceError: the choice makes no sense, or mode "baked" needs one.
    """
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
