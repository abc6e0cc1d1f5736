"""Open a session for a model and a request, and build its engine."""

import dataclasses
from collections.abc import Mapping, Sequence

from lorac.adapters.training_terms import AdapterTerms
from lorac.errors import AdapterError, ChoiceError
from lorac.frontend.components import Components, get_component_prefix, list_components
from lorac.frontend.host import Host
from lorac.frontend.layer_classes import check_layer
from lorac.frontend.site_discovery import find_sites
from lorac.frontend.weight_reads import observe_example
from lorac.ir.graph.graph import Program
from lorac.ir.sites.patterns import check_targets_match, select_sites
from lorac.ir.slots.choice import Choice, ChoiceSpec, parse_choice
from lorac.ir.slots.composition import compose_choice
from lorac.ir.slots.required_slots import Reserve, plan_sites
from lorac.progress import progress
from lorac.runtime.traits import collect_traits
from lorac.session.adapter_loading import make_adapter
from lorac.session.host_model import HostModel
from lorac.session.lowering.lower import find_component_example, lower_model, lower_stored
from lorac.session.lowering.quantised_base import warn_of_quantised_products
from lorac.session.request.compile_request import CompileRequest
from lorac.session.request.placement import resolve_placement
from lorac.session.request.precision import find_widened, prepare_model
from lorac.session.request.sources import ModelSource
from lorac.session.session import Session
from lorac.target.backend import BuildRequest, TargetOptions
from lorac.target.engine import Engine
from lorac.variants.adapter import Adapter


def open_session(source: ModelSource, request: CompileRequest) -> Session:
    """Open a session for a model and its adapters, and plan its sites."""
    module = Components(source.model) if isinstance(source.model, Mapping) else source.model
    options, model_device = resolve_placement(request.backend, request.options, request.device, module)
    dialect = request.backend.dialect_for(options)
    model, precision = prepare_model(module, dialect, request.dtype, model_device)
    host = HostModel(model, source.model, {"dtype": request.dtype, "device": request.device})
    host.widened = find_widened(module, model)
    session = Session.over(host, request.backend, options, "live" if request.mode == "auto" else request.mode)
    examples = request.example_inputs if request.dtype is None else precision.fit(request.example_inputs)
    session.examples = {"example_inputs": examples, "dynamic_shapes": request.dynamic_shapes}
    session.precision, session.traits = precision, collect_traits(model)
    if dialect.emits:
        warn_of_quantised_products(session, module)
    session.quantise_sites()
    names = {name for name, _ in request.sources}
    given = (*(named for named in source.adapters if named[0] not in names), *request.sources)
    adapters = [make_adapter(session, one, name) for name, one in given]
    make_room(session, adapters, request.reserve)
    for adapter in adapters:
        session.pool.add(adapter, session.pool.prepare(adapter))
    session.plans = plan_sites(session.sites, session.pool, request.mode, request.reserve, dialect.ranks_at)
    _check_layers(session)
    return session


def _check_layers(session: Session) -> None:
    """Refuse layers that change their own input or output, and adapters on layers that calls read but never call.

    A call with the example inputs is observed; without them, the first whole call; for an emitted program, its capture.
    """
    model, layers = session.host.module, [path for path, plan in session.plans.items() if plan.site.is_layer]
    adapted = {path for name in session.pool.adapters for path in session.pool[name].paths}
    for path in layers:
        if path not in adapted:
            check_layer(path, model)
    if session.backend.emits or not layers:
        return
    for name, component in list_components(model).items():
        inputs, prefix = find_component_example(session, "example_inputs", name), get_component_prefix(model, name)
        own = [path.removeprefix(prefix) for path in layers if path.startswith(prefix)]
        reads = None if inputs is None else observe_example(Host.of(component), own, session.precision.fit(inputs))
        if reads is not None:
            found = ({f"{prefix}{path}" for path in paths} for paths in (reads.read, reads.called))
            session.reads.note(name, *found)


def resolve_active(session: Session, source: ModelSource, request: CompileRequest) -> Choice:
    """Return the choice that is active first: the given choice, a PeftModel's, the only adapter, or no adapter.

    Raises:
        AdapterNotFound, ChoiceError: the choice is invalid, or missing for several adapters in mode "baked".
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


def build_engine(session: Session, choice: Choice, stored: Program | None = None) -> Engine:
    """Build an engine, and release the model if the engine does not run it.

    Args:
        session: the model, adapters and backend.
        choice: the adapters that become constants of a baked engine.
        stored: an artifact's program at level expanded; None: the model is captured if the target needs a program.
    """
    backend, options = session.backend, session.options
    request = make_build_request(session, choice)
    backend.check(request)
    dialect = backend.dialect_for(options)
    with progress(f"compiling for {dialect.name}") as report:
        report.step("capture and passes")
        if stored is not None:
            request = dataclasses.replace(request, program=lower_stored(session, stored, options.aux))
        elif dialect.emits:
            request = dataclasses.replace(request, program=lower_model(session, options.aux))
        engine = backend.build(request)
    if engine.files is not None:
        session.release_model(backend.read_base_weights(engine.files))
    return engine


def make_build_request(session: Session, choice: Choice, program: Program | None = None) -> BuildRequest[TargetOptions]:
    """Return the request by which a backend builds or stores an engine."""
    return BuildRequest(
        model=session.host.module,
        sites=session.sites,
        plans=session.plans,
        base=session.base,
        mode=session.mode,
        snapshot=compose_choice(session.plans, session.pool, choice, session.base),
        options=session.options,
        terms=AdapterTerms(session.pool, session.preparer),
        reads=session.reads,
        program=program,
    )


def make_room(session: Session, adapters: Sequence[Adapter], reserve: Reserve | None) -> None:
    """Widen the layers that adapters replace by layers of other sizes, in a copy of the session's model.

    Args:
        adapters: the session's adapters.
        reserve: gives the largest sizes of layers of later adapters (``outputs``).

    Raises:
        SiteError: ``reserve`` names no layer that an adapter may replace.
        AdapterError: an adapter changes a layer that another adapter replaces by a layer of another size.
    """
    sites = session.sites
    layers, largest = {path: site for path, site in sites.items() if site.is_resizable}, dict[str, int]()
    for name, size in {} if reserve is None else reserve.outputs.items():
        check_targets_match("reserve", (name,), layers)
        largest |= {site.path: max(size, site.size) for site in select_sites(layers, (name,))}
    for site in layers.values():
        found = {len(one.replaced[str(site.weight)]) for one in adapters if str(site.weight) in one.replaced}
        if found - {site.size}:
            largest[site.path] = max(*found, largest.get(site.path, 0), site.size)
    for path in tuple(largest):
        largest |= {other: max(largest[path], largest.get(other, 0)) for other in (path, *sites[path].shares)}
    if not largest:
        return
    for name, path in ((one.name, path) for one in adapters for path in largest if path in one.tensors):
        raise AdapterError(
            f"adapter '{name}' changes '{path}', which other adapters replace by layers of other sizes",
            next_step="compile it without these, or train it with modules_to_save in place of target_modules there",
        )
    names = {name: size for path, size in largest.items() for name in sites[path].stored_names}
    session.host.widen(names)
    wide = find_sites(session.host.module)
    widened = {path: dataclasses.replace(wide[path], own_size=sites[path].size) for path in largest}
    session.preparer.sites = {**sites, **widened}
