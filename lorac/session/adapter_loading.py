"""Make the adapters of a session from the arguments of compile() and add_adapter()."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from lorac.adapters.adapter_sites import add_adapted_modules, add_named_modules, make_once_sites
from lorac.adapters.fit import check_adapter, refuse_invocation
from lorac.adapters.fresh import add_replaced_parameters, make_fresh_adapter, make_trainable
from lorac.adapters.preparation import Preparer
from lorac.adapters.token_rows import split_token_rows
from lorac.errors import AdapterError, BaseNeeded, UnknownMethod
from lorac.formats import load_adapter
from lorac.formats.native import load_record
from lorac.frontend.components import check_component, get_graph_scope
from lorac.frontend.layer_classes import check_layer
from lorac.ir.slots.plans import PreparedAdapter
from lorac.session.request.sources import AdapterSource, check_argument_order, read_source
from lorac.session.session import SHAPES_ONLY, Session
from lorac.storage.normal_forms import read_normal_forms
from lorac.storage.open_file import OpenFile
from lorac.variants.adapter import TOKEN_ROWS, Adapter
from lorac.variants.base import Variant
from lorac.variants.base_parameters import Full
from lorac.variants.union import Union


def make_adapter(session: Session, given: object, name: str | None) -> Adapter:
    """Make an adapter for a session: read its file, create a variant's tensors, or copy the object.

    Args:
        session: the session, to which the sites that the adapter touches are added.
        given: a path, an Adapter, a fresh Variant, a configuration of PEFT's, or component -> a path or Adapter.
        name: the adapter's name; default: the name of its file, object or method.

    Raises:
        AdapterError: the name is taken or invalid, or the adapter does not fit the model.
        BaseNeeded: the adapter needs base weights that the engine does not keep.
    """
    check_argument_order(given, name)
    _check_name(name)
    source = read_source(given, name)
    try:
        adapter = _read(session, source, name)
    except NotImplementedError as error:  # the file has a copy of a base weight, which is on the meta device
        raise _missing_base_weights(name or str(source)) from error
    _check_name(adapter.name)
    session.pool.check_name_free(adapter.name)
    if any(tensor.is_meta for tensor in adapter.parameters()):
        raise _missing_base_weights(adapter.name)
    add_sites(session, adapter)
    if not session.backend.emits:  # sessions of the target eager train
        adapter = split_token_rows(adapter, session.view)
    return make_trainable(adapter, session.view)


def restore_adapter(session: Session, name: str, record: OpenFile, forms: OpenFile | None) -> None:
    """Add an adapter of an artifact to a session's pool.

    Args:
        name: the adapter's name.
        record: the adapter in lorac's own format.
        forms: the adapter's normal forms, with which the class of its method is not needed.

    Raises:
        UnknownMethod: the class of the method is not imported, and there are no normal forms.
    """
    with record.named() as path:
        try:
            adapter = make_adapter(session, path, name)
        except UnknownMethod:
            if forms is None:
                raise
            adapter = load_record(path, name)
            add_sites(session, adapter)
    session.pool.add(adapter, None if forms is None else read_normal_forms(forms))


def outline_adapter_forms(session: Session, adapter: Adapter) -> PreparedAdapter:
    """Return an adapter's normal forms with the right shapes and arbitrary values; base weights are not needed."""
    return Preparer(session.sites, SHAPES_ONLY).prepare(adapter)


def _read(session: Session, source: AdapterSource, name: str | None) -> Adapter:
    view = session.view
    if isinstance(source, str | Path):
        return load_adapter(source, view, name)  # the format checks it against the model
    if isinstance(source, Mapping):
        parts: dict[str, Adapter] = {}
        for component, part in source.items():
            prefix = get_graph_scope(check_component(component, session.traits)).removesuffix(".")
            own = part if isinstance(part, Adapter) else load_adapter(part, view.module.get_submodule(prefix), name)
            parts[component] = own
        adapter = join_components(parts, name or next(iter(parts.values())).name)
    elif isinstance(source, Variant):
        variant = source.for_model(view, session.precision.fit(session.examples.get("example_inputs")))
        adapter = make_fresh_adapter(variant, name or source.name, add_named_modules(variant, view), session.base)
    else:
        adapter = dataclasses.replace(source, name=name or source.name)
    check_adapter(adapter, view)
    return adapter


def add_sites(session: Session, adapter: Adapter) -> None:
    """Add a site for every module that an adapter names, and for every parameter that it replaces.

    Raises:
        SiteError: a layer's own code changes the layer's input or output (``check_layer``); only checked while the
            model is in memory.
    """
    if session.mode != "live":
        refuse_invocation(adapter, f"the weights of mode='{session.mode}' act on every token")
    view = add_adapted_modules(adapter, session.view)
    for path in adapter.tensors if session.host.in_memory else ():
        if view.sites[path].is_layer and not isinstance(adapter.variant.at(view.sites[path]), Full):
            check_layer(path, view.module)
    view = view.with_sites(make_once_sites(adapter, view.sites))
    session.preparer.sites = add_replaced_parameters(adapter, view).sites


def _check_name(name: object) -> None:
    """Raise ``AdapterError`` for a name that is not a string, is empty, or cannot be encoded; None is accepted."""
    if name is None:
        return
    if not isinstance(name, str) or not name:
        raise AdapterError(f"an adapter cannot be called {name!r}", next_step="give it a name of one letter or more")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise AdapterError(
            f"an adapter cannot be called {name!r}: no file can hold that", next_step="give it another name"
        ) from error


def _missing_base_weights(adapter: str) -> BaseNeeded:
    return BaseNeeded(
        f"adapter '{adapter}' needs base weights that the engine does not keep",
        next_step="compile from the model again, with the adapter in adapters=",
    )


def join_components(parts: Mapping[str, Adapter], name: str) -> Adapter:
    """Return one adapter with the sites of all parts.

    Args:
        parts: component -> its adapter, with paths within the component.
        name: the name of the result.

    Raises:
        OptionError: the parts differ in method, and one of them cannot be part of a union.
    """
    located = {component: _locate(component, part) for component, part in parts.items()}
    variants = [part.variant for part in located.values()]
    first, targets = variants[0], tuple(path for variant in variants for path in variant.targets)
    equal = all(dataclasses.replace(variant, targets=first.targets) == first for variant in variants)
    rows = {path: own for part in located.values() for path, own in part.provenance[TOKEN_ROWS].items()}
    return Adapter(
        name,
        dataclasses.replace(first, targets=targets) if equal else Union.over(*variants, like=first),
        {path: tensors for part in located.values() for path, tensors in part.tensors.items()},
        {path: tensor for part in located.values() for path, tensor in part.replaced.items()},
        {TOKEN_ROWS: rows} if rows else {},
    )


def _locate(component: str, part: Adapter) -> Adapter:
    """Return a component's adapter with the component's name before all paths, and its sites as its targets."""
    tensors = {f"{component}.{path}": at for path, at in part.tensors.items()}
    replaced = {f"{component}.{name}": tensor for name, tensor in part.replaced.items()}
    rows = {f"{component}.{name}": own for name, own in part.provenance.get(TOKEN_ROWS, {}).items()}
    variant = dataclasses.replace(part.variant, targets=tuple(tensors), exclude=(), layers=())
    return Adapter(part.name, variant, tensors, replaced, {TOKEN_ROWS: rows})
