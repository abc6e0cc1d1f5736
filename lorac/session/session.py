"""What lives on after a compilation: reading and preparing adapters, training's terms, the graph, saving."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lorac.adapters.adapter_sites import add_adapted_modules, add_named_modules, get_once_path, make_once_sites
from lorac.adapters.branches import make_branch_term, make_once_term
from lorac.adapters.fit import check_adapter
from lorac.adapters.fresh import add_replaced_parameters, make_fresh_adapter, make_trainable
from lorac.adapters.preparation import Preparer
from lorac.argument_types import check_type
from lorac.errors import AdapterError, BaseNeeded, UnknownMethod
from lorac.formats import load_adapter, save_adapter
from lorac.formats.native import load_record, variant_config
from lorac.frontend.base_weights import read_stored_tensor
from lorac.frontend.model_view import ModelView
from lorac.ir.algebra.changes import LowRank
from lorac.ir.algebra.reduction import BRANCH
from lorac.ir.sites import BaseReader, Site, SiteKind
from lorac.ir.slots.choice import Active, Choice
from lorac.ir.slots.filling import strength_tensor
from lorac.ir.slots.live_terms import Dropout, LiveTerm
from lorac.ir.slots.plans import BranchFill, BranchTerm, PreparedAdapter
from lorac.runtime.adapter_pool import AdapterPool
from lorac.session import artifact
from lorac.session.compiled import Compiled
from lorac.session.host_model import HostModel
from lorac.session.sources import AdapterSource, check_argument_order, read_source
from lorac.storage.normal_forms import read_normal_forms, write_normal_forms
from lorac.storage.open_file import OpenFile
from lorac.storage.tensor_file import make_file_base_reader
from lorac.target.engine import Backend, BuildRequest, TargetOptions
from lorac.variants._missing_method import homes
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant

if TYPE_CHECKING:
    from lorac.report.graph_views import PassHistory


class Session:
    """The host, its sites and its adapters, for as long as a compiled model lives.

    Args:
        host: the host model, or what an artefact has of it.

    Attributes:
        sites: every site of the host, and the parameters that adapters replace.
        pool: the adapters, prepared.
        request: what the engine was built from, where it runs the host itself.
        examples: inputs of the host as they were given, if they were.
    """

    def __init__(self, host: HostModel) -> None:
        self.host = host
        self.sites: dict[str, Site] = dict(ModelView.of(host.module).sites)
        self.base = BaseReader(self._weight, self._bias)
        self.preparer = Preparer(self.sites, self.base)
        self.pool = AdapterPool(self.prepare)
        self.request: BuildRequest[TargetOptions] | None = None
        self.examples: object = None

    def hold(self, sites: dict[str, Site]) -> None:
        """Take the sites as an engine is to hold their weights; what is left of the host says so too."""
        self.preparer.sites = self.sites = sites
        self.host.packed = {s.weight: s.packed for s in sites.values() if s.weight and s.packed}

    @functools.cached_property
    def stages(self) -> PassHistory:
        """What the passes did to each graph: nothing, until they do."""
        from lorac.report.graph_views import PassHistory

        return PassHistory()

    # --- adapters ----------------------------------------------------------------------------------------------

    def load(self, given: object, name: str | None) -> Adapter:
        """An adapter of this model's own from whatever ``source_of`` takes."""
        model = self.host.module
        check_argument_order(given, name)
        _check_name(name)
        source = read_source(given, name)
        try:
            adapter = self._read(source, name, model)
        except NotImplementedError as error:  # a weight on the meta device: the file holds a copy to compare with
            raise _missing_base_weights(name or str(source)) from error
        _check_name(adapter.name)
        self.pool.refuse_taken(adapter.name)
        if any(tensor.is_meta for tensor in adapter.parameters()):
            raise _missing_base_weights(adapter.name)
        self._place(adapter, model)
        return make_trainable(adapter, self.sites)

    def _place(self, adapter: Adapter, model: nn.Module) -> None:
        """Have a site for every module that an adapter names, and every parameter that it replaces."""
        view = add_adapted_modules(adapter, ModelView(model, self.sites))
        view = view.with_sites(make_once_sites(adapter, view.sites))
        self.preparer.sites = self.sites = dict(add_replaced_parameters(adapter, view).sites)

    def register(self, adapter: Adapter) -> None:
        """Prepare an adapter and put it into the pool."""
        self.pool.put(adapter, self.pool.prepare(adapter))

    def restore(self, name: str, record: OpenFile, forms: OpenFile | None) -> None:
        """Put an adapter of an artefact into the pool; it is prepared when it is first asked for.

        Where the artefact holds what it comes to, no class is asked for it.

        Raises:
            UnknownMethod: it holds only the record, and the method's class is not imported.
        """
        with record.named() as path:
            adapter = self._recorded(path, name, formed=forms is not None)
        if forms is None:
            self.pool.put_later(adapter)
        else:
            self.pool.put(adapter, read_normal_forms(forms))

    def _recorded(self, path: Path, name: str, *, formed: bool) -> Adapter:
        """An adapter of an artefact; its method may have no class here where its forms are known."""
        try:
            return self.load(path, name)
        except UnknownMethod:
            if not formed:
                raise
        adapter = load_record(path, name)
        self._place(adapter, self.host.module)
        return adapter

    def _read(self, source: AdapterSource, name: str | None, model: nn.Module) -> Adapter:
        if isinstance(source, str | Path):
            return load_adapter(source, model, name)  # its format holds it against the model
        if isinstance(source, Variant):
            view = ModelView(model, self.sites)
            settled = source.for_model(view, self.examples)
            adapter = make_fresh_adapter(settled, name or source.name, add_named_modules(settled, view), self.base)
        else:
            adapter = dataclasses.replace(source, name=name or source.name)
        check_adapter(adapter, ModelView(model, self.sites))
        return adapter

    @torch.no_grad()
    def prepare(self, adapter: Adapter) -> PreparedAdapter:
        """An adapter's normal forms."""
        return self.preparer.prepare(adapter)

    @torch.no_grad()
    def outline(self, adapter: Adapter) -> PreparedAdapter:
        """An adapter's normal forms with their shapes alone, for sites whose base weight is not kept."""
        return Preparer(self.sites, _PLACEHOLDER_WEIGHTS).prepare(adapter)

    # --- training ----------------------------------------------------------------------------------------------

    def terms(self, path: str, choice: Choice) -> Sequence[LiveTerm] | None:
        """The active terms of a site from the adapters' own tensors; None where there are none."""
        adapters = self.pool.adapters
        found = [term for name, how in choice for term in self._terms_of(adapters[name], path, how)]
        return found or None

    def _terms_of(self, adapter: Adapter, path: str, how: Active) -> list[LiveTerm]:
        site = self.sites[path]
        tensors = adapter.tensors.get(path)
        method = adapter.variant if tensors is None else adapter.variant.method_at(path)
        rate, place = float(getattr(method, "dropout", 0.0)), method.dropout_place
        if site.kind is SiteKind.ONCE:
            mine = path == get_once_path(adapter)
            return [_branch_live_term(make_once_term(adapter, self.sites, detach=False), site, how)] if mine else []
        if tensors is None:
            change = self.preparer.replaced_change(adapter, site)
            return [] if change is None else [LiveTerm(how.strength, change)]
        reduction = self.preparer.reduction(adapter.variant, site, tensors)
        if reduction.form == BRANCH:
            return [_branch_live_term(make_branch_term(adapter, site, detach=False), site, how, rate, place)]
        change = self.preparer.change(reduction, site, tensors)
        if how.rank is not None and isinstance(change, LowRank):
            change = change.truncated(how.rank, adapter.variant.truncatable or 0.0)
        change = self.preparer.with_bias(adapter, site, change)
        dropped = self.preparer.dropped(adapter, site) if rate and place is Dropout.RANK else None
        return [LiveTerm(how.strength, change, rate=rate, place=place, dropped=dropped)]

    # --- the program -------------------------------------------------------------------------------------------

    def let_go(self, tensors: Mapping[str, torch.Tensor] | None) -> None:
        """Let go what an engine over an emitted program does not need of the host, given its base weights."""
        self.host.let_go(tensors or {})
        self.read_from(tensors)
        if self.host.packed:  # what is quantised is not what adapters were prepared for
            self.pool.forget_prepared()

    def read_from(self, tensors: Mapping[str, torch.Tensor] | None) -> None:
        """Read base weights from these from now on; None: only shapes are asked for any more, in reports."""
        self.base = self.preparer.base = _PLACEHOLDER_WEIGHTS if tensors is None else make_file_base_reader(tensors)

    def shown(self) -> PassHistory:
        """What the passes did to each graph; a host that runs as it is is captured for it now."""
        if not self.stages.dumps and self.request is not None:
            self.request.program(())
        return self.stages

    def save(
        self,
        backend: Backend[TargetOptions],
        compiled: Compiled,
        folder: str | Path,
        tokenizer: Callable[[Path], object] | None,
    ) -> None:
        """Write an artefact of a compiled model."""
        check_type(folder, (str, os.PathLike), "where compiled.save writes to", next_step="give the path of a folder")

        def request() -> BuildRequest[TargetOptions]:
            assert self.request is not None
            return self.request

        artifact.save(
            compiled,
            folder,
            host=self.host.described,
            store=lambda staged: backend.store(compiled.engine, staged, request),
            save_adapter=_write_adapter,
            reductions=self.preparer.stored_reductions(self.pool.adapters.values()),
            tokenizer=tokenizer,
        )

    def _weight(self, site: Site) -> torch.Tensor:
        assert site.weight is not None
        return site.present(read_stored_tensor(self.host.module, site.weight).detach())

    def _bias(self, site: Site) -> torch.Tensor | None:
        return self.host.module.get_parameter(site.bias).detach() if site.bias else None


def _branch_live_term(
    term: BranchTerm, site: Site, how: Active, rate: float = 0.0, place: Dropout = Dropout.NONE
) -> LiveTerm:
    """A branch computed from the adapter's own tensors."""
    fill = BranchFill(strength_tensor(term, site, how.strength), term.params)
    return LiveTerm(how.strength, branch=(term.slot, fill), rate=rate, place=place)


def _write_adapter(adapter: Adapter, forms: Callable[[], PreparedAdapter], stem: Path) -> dict[str, object]:
    """Write an adapter for an artefact: its record, and its normal forms where whoever reads it may lack its class.

    Returns:
        What the manifest says of it: its method, the names of its files, the modules of classes that are not lorac's.
    """
    record = stem.with_name(f"{stem.name}.safetensors")
    save_adapter(adapter, record, format="native")
    method, modules = adapter.variant, homes(adapter.variant)
    told: dict[str, object] = {
        artifact.RECORD: record.name,
        "variant": method.name,
        "hyperparameters": variant_config(method)[0],
    }
    if not modules:
        return told
    formed = stem.with_name(f"{stem.name}.forms.safetensors")
    write_normal_forms(formed, forms())
    return {**told, artifact.FORMS: formed.name, "modules": modules}


def _ones_at(site: Site) -> torch.Tensor:
    return torch.ones(*site.stacked, site.out_features, site.in_features, dtype=site.dtype)


def _zeros_at(site: Site) -> torch.Tensor | None:
    return torch.zeros(site.out_features, dtype=site.dtype) if site.bias else None


_PLACEHOLDER_WEIGHTS = BaseReader(_ones_at, _zeros_at)
"""Stands for base weights where only shapes are asked for."""


def _check_name(name: object) -> None:
    """Raise ``AdapterError`` for what no adapter can be called; any text that files can hold is a name.

    Args:
        name: what was asked for; None for the adapter's own.
    """
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
