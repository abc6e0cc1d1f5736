"""Reading a file of image models: every tensor must belong to a module of the model and to a method there."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lorac.adapters.fit import check_adapter, no_site_error, sort_by_site
from lorac.errors import FormatError, SiteError, require_base, shape_error, short, unused_error
from lorac.formats._config_fields import BASE_HASH
from lorac.formats._errors import corrupt_error, unsupported_error
from lorac.formats._image_files.converters import convert_names
from lorac.formats._image_files.layout import Method, StoredModule, unused_tensor
from lorac.formats._image_files.layouts import LAYOUTS
from lorac.formats._image_files.layouts.loras import find_alpha
from lorac.formats._image_files.magnitudes import MAGNITUDES, add_magnitude
from lorac.formats._image_files.methods import join_methods, read_configs, seal_text
from lorac.formats._image_files.original_names import Place
from lorac.formats._image_files.places import LAYERS, PipelineModel, choose_component, list_pipeline, pipeline_names
from lorac.formats._image_files.rows import split_rows
from lorac.formats._image_files.spellings import COMPONENTS, DIFFERENCES, TensorName, parse_name
from lorac.formats._site_layouts import LAYOUT, matrix_site, site_to_json
from lorac.formats.engines import LOST_SCALE
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.site import Site
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant
from lorac.variants.base_parameters import LNTuning
from lorac.variants.low_rank import ScaledRank

ALPHA = "alpha"
_STABILISED = re.compile(r'"rs_lora":\s*"?true', re.IGNORECASE)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_AGAIN = "save the adapter again from its trainer: the file holds two adapters, or one in two spellings"


@dataclass
class _Module:
    """The tensors that a file has for one module of a component."""

    component: PipelineModel
    place: Place
    beginning: str
    names: dict[str, TensorName] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The name of one of the module's tensors, for messages."""
        return next(iter(self.names.values())).key

    @property
    def name(self) -> str:
        """The name of the module in the file."""
        return next(iter(self.names.values())).module


def read_file(file: AdapterFile, view: ModelView | None, name: str, format: str) -> Adapter:
    """Return the adapter of a safetensors file.

    Raises:
        BaseNeeded: no model is given.
        FormatError, AdapterError, SiteError: as ``load_adapter``.
    """
    view = require_base(
        view,
        f"'{file}' names modules of image models, and only the model tells which modules these are",
        next_step="load_adapter(path, model), with all models that it adapts: {'unet': unet, 'text_encoder': …}",
    )
    tensors, path = file.read_tensors(), file.path
    file.check_seal(seal_text(file.metadata), tensors)
    # Layouts compute with the values, and torch computes in no float of one byte.
    wide = {key: tensor.float() if tensor.dtype in _FLOAT8 else tensor for key, tensor in tensors.items()}
    return _FileReader(path, view, name, convert_names(path, wide, view), file.metadata).read(format)


@dataclass(frozen=True)
class _FileReader:
    path: Path
    view: ModelView
    name: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    def read(self, format: str) -> Adapter:
        """Return the adapter, checked against the model."""
        adapter = Adapter(self.name, LNTuning())
        methods: dict[str, Variant] = {}
        configs = read_configs(self.metadata, self.path)
        modules: dict[tuple[str, str], _Module] = {}
        for name, component in self._list_names():
            at = (component.name, name.module)
            if at not in modules:
                modules[at] = _Module(component, component.find(name, self.name), name.component)
            if name.leaf in modules[at].names:
                other = modules[at].names[name.leaf].key
                raise FormatError(f"'{self.path}' has both '{name.key}' and '{other}'", next_step=_AGAIN)
            modules[at].names[name.leaf] = name
        for module in modules.values():
            adapter.replaced |= self._read_differences(module)
            found = dict(self._read_methods(module, configs))
            for twice in found.keys() & methods.keys():
                raise unused_error(
                    f"'{self.path}' has '{module.key}', and another module of the file also stands for '{twice}'",
                    next_step=_AGAIN,
                )
            methods |= {path: method for path, (method, _) in found.items()}
            adapter.tensors |= {path: tensors for path, (_, tensors) in found.items()}
        whole = LNTuning(targets=tuple({key.rpartition(".")[0] for key in adapter.replaced}))
        adapter.variant = join_methods(methods) if methods else whole
        adapter.tensors = sort_by_site(adapter.tensors, self.view)
        adapter.provenance = {
            "format": format,
            "source": str(self.path),
            "base": self.metadata.get(BASE_HASH),
            LAYOUT: {path: site_to_json(self.view.sites[path]) for path in adapter.tensors},
        }
        if {"lokr", "glora"} & {one.name for one in methods.values()}:  # those of LoRA and LoHa have it in alpha
            lost = _STABILISED.search(self.metadata.get("ss_network_args", ""))
            adapter.provenance |= {LOST_SCALE: "rs_lora"} if lost else {}
        check_adapter(adapter, self.view)
        return adapter

    def _list_names(self) -> list[tuple[TensorName, PipelineModel]]:
        """Return each name of the file, parsed, with the model that it belongs to."""
        pipeline = list_pipeline(self.view)
        beginnings = {*COMPONENTS, *(f"{name}." for name in pipeline)}
        found = []
        for key in self.tensors:
            name = parse_name(key, beginnings)
            if name is None:
                raise unused_tensor(f"'{self.path}'", key, "under that name")
            component = choose_component(name.component, pipeline)
            if component is None:
                wanted, given = pipeline_names(name.component)[0], ", ".join(f"'{known}': …" for known in pipeline)
                raise FormatError(
                    f"'{self.path}' has '{name.key}' of the pipeline's {wanted}, which is not one of the models given",
                    next_step=f"give that model as well: {{{given}, '{wanted}': …}}",
                )
            found.append((name, component))
        alone = dict.fromkeys(pipeline_names(name.component) for name, component in found if not component.prefix)
        if len(alone) > 1:  # a single model is given, without its name in the pipeline, and the file names several
            several = [names[0] for names in alone]
            raise FormatError(
                f"'{self.path}' adapts several models of a pipeline, {' and '.join(several)}, and one model is given",
                next_step="give all of them by name: {" + ", ".join(f"'{name}': …" for name in several) + "}",
            )
        return found

    def _read_differences(self, module: _Module) -> dict[str, Tensor]:
        """Take the differences of norms and of separate biases from a module; return the new parameters by name."""
        paths = [module.component.prefix + path for path in module.place.paths]
        site = self.view.sites.get(paths[0])
        if "diff" in module.names and site is not None and site.kind in LAYERS:  # a method reads it
            return {}
        taken = {leaf: module.names.pop(leaf) for leaf in DIFFERENCES if leaf in module.names}
        if not taken:
            return {}
        if len(paths) > 1:
            raise unsupported_error(
                f"'{next(iter(taken.values())).key}' is the difference of one layer, which is {len(paths)} layers here",
                next_step="save it from its trainer under the names of diffusers",
            )
        known, found = self.view.named_tensors(), {}
        for leaf, name in taken.items():
            parameter = f"{paths[0]}.{DIFFERENCES[leaf]}"
            if parameter not in known or known[parameter].shape != self.tensors[name.key].shape:
                shape = tuple(known[parameter].shape) if parameter in known else "no such parameter"
                raise shape_error(
                    f"'{name.key}' has shape {tuple(self.tensors[name.key].shape)}, and '{parameter}' {shape}",
                    next_step="load the base model that the adapter was trained on",
                )
            base, change = self.view.tensor(parameter).detach(), self.tensors[name.key]
            found[parameter] = base.to(torch.promote_types(base.dtype, change.dtype)) + change.to(base.device)
        return found

    def _read_methods(self, module: _Module, configs: Mapping[str, ScaledRank]) -> Iterator[tuple[str, Method]]:
        """Yield path, method and tensors of every layer that a module of the file stands for."""
        if not module.names:
            return
        sites = [self._find_site(module.component.prefix + path) for path in module.place.paths]
        layout = next((layout for layout in LAYOUTS if not module.names.keys().isdisjoint(layout.leaves)), None)
        if layout is None:
            raise unused_tensor(f"'{self.path}'", module.key, "without other tensors of its module")
        names, first, widths = dict(module.names), sites[0], [site.out_features for site in sites]
        alpha = None
        if ALPHA in names:
            key = names.pop(ALPHA).key
            if self.tensors[key].numel() != 1 or self.tensors[key].is_complex():
                raise shape_error(
                    f"'{key}' has shape {tuple(self.tensors[key].shape)}, expected one number",
                    next_step="copy the file again, or save the adapter again from its trainer",
                )
            alpha = float(self.tensors[key]) or None  # 0 means the scale 1
        stored = StoredModule(
            first if len(sites) == 1 else matrix_site(module.name, sum(widths), first.in_features),
            {leaf: self.tensors[name.key] for leaf, name in names.items()},
            {leaf: name.key for leaf, name in names.items()},
            alpha,
        )
        own = stored.without(MAGNITUDES)
        layout.check(own, f"'{self.path}'")
        config = configs.get(module.beginning.removesuffix("."))
        if config is not None and alpha is None:
            here = config.at_path(module.name)
            assert isinstance(here, ScaledRank)
            rank = own.length("lora_down") if "lora_down" in own.tensors else here.r
            if rank != here.r:
                raise corrupt_error(
                    f"'{module.key}' has rank {rank}, and the configuration in the metadata of '{self.path}' says "
                    f"{short(here.r)}"
                )
            own = replace(own, alpha=find_alpha(here))
        method = add_magnitude(layout.read(own), stored)
        if len(sites) == 1 and not module.place.swapped:
            yield first.path, method
            return
        parts = split_rows(method, layout, module.place, widths, first.in_features, module.key)
        for site, part in zip(sites, parts, strict=True):
            if part is not None:
                yield site.path, part

    def _find_site(self, path: str) -> Site:
        site = self.view.sites.get(path)
        if site is None:
            raise no_site_error(self.name, path, self.view)
        if site.kind not in LAYERS or site.within is not None:
            raise SiteError(
                f"adapter '{self.name}' has tensors for '{path}', and these files adapt no {site.kind}",
                next_step="load the model that the adapter was trained on; `lorac sites MODEL` prints the sites of one",
            )
        return site
