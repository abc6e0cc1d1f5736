"""Writing a PEFT folder from which PEFT computes the same result."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorac.adapters.base_hash import compute_base_hash
from lorac.adapters.fit import check_adapter
from lorac.adapters.fresh import make_site_tensors
from lorac.argument_types import JsonMapping
from lorac.errors import BaseNeeded
from lorac.formats._config_fields import BASE_HASH, EXPERTS, SEAL, encode_config, write_json, write_sealed
from lorac.formats._errors import native_or_lora, unsupported_error
from lorac.formats._site_layouts import remembered_sites
from lorac.formats.engines import ENGINE, ENGINES, find_model_type
from lorac.formats.peft.checks import saved_parameter_names, select_targets
from lorac.formats.peft.config import peft_types, write_config
from lorac.formats.peft.keys import (
    EMBEDDING_NAMES,
    PREFIX,
    SHARED_PREFIX,
    TOKENS,
    WRAPPED,
    copied_module,
    embedding_modules,
    is_saved,
)
from lorac.formats.peft.peft_type import AnyPeftType
from lorac.formats.peft.target_parameters import matrix_paths, name_parameters, split_experts, write_matrices
from lorac.formats.peft.token_rows import NumberedRows, take_rows, untied_error
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.patterns import TARGET_KEYWORDS, is_named
from lorac.ir.sites.site import BaseReader, Site
from lorac.storage.strict_json import dump_json
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def write_folder(adapter: Adapter, folder: Path, view: ModelView | None, *, of_fork: bool = False) -> None:
    """Write adapter_config.json and adapter_model.safetensors into a new folder.

    Args:
        of_fork: write the folder for the fork of PEFT that has the method, if PEFT itself does not have it.

    Raises:
        FormatError: PEFT has no type for the method, or cannot store a tensor.
        BaseNeeded: the adapter was not read from a file, and no model is given.
    """
    check_adapter(adapter, view)
    adapter, rows = take_rows(adapter, view)
    adapter = _convert(adapter)
    original = (adapter.provenance.get("config") or {}).get("peft_type")
    for peft_type in sorted(peft_types().values(), key=lambda one: one.peft_type != original):
        if type(adapter.variant) in peft_type.variants and of_fork == (type(adapter.variant) in peft_type.read_only):
            break
    else:
        raise unsupported_error(
            f"PEFT has no type for '{adapter.variant.name}', the method of adapter '{adapter.name}'",
            next_step=native_or_lora(adapter.variant),
        )
    if rows and "trainable_token_indices" not in peft_type.fields:
        raise unsupported_error(
            f"PEFT's {peft_type.peft_type} cannot store the rows of '{min(rows)}' in adapter '{adapter.name}'"
        )
    contents = peft_type.write_folder(adapter, view)
    folder.mkdir()
    if contents is None:
        known = remembered_sites(adapter) if view is None else view.sites
        engine = ENGINES.get(adapter.provenance.get(ENGINE, ""))
        names = engine.experts_of(find_model_type(view)) if engine and view else None
        adapter, apart = split_experts(adapter, known, names) if names else (adapter, {})
        _FolderWriter(adapter, peft_type, view, known, rows, apart).write(folder)
        return
    tensors, experts = contents
    for name, expert in experts.items():
        write_folder(expert, folder / name, view)
    given = {"adapters": {name: name for name in experts}}
    _write_files(adapter, peft_type, given, tensors, folder, view, seal_experts(folder, experts))


def seal_experts(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the metadata entry with the experts' seals, read from the folders of the given names."""
    return {EXPERTS: dump_json({name: AdapterFile(folder / name / WEIGHTS).metadata[SEAL] for name in names})}


def seal_text(config: JsonMapping, metadata: Mapping[str, str]) -> str:
    """Return the text that the seal covers with the tensors: the configuration with sorted names, and other hashes."""
    hashes = {BASE_HASH: metadata.get(BASE_HASH)} | {key: metadata[key] for key in (EXPERTS,) if key in metadata}
    return encode_config({"config": {name: config[name] for name in sorted(config)}, **hashes})


def _convert(adapter: Adapter) -> Adapter:
    """Convert an adapter whose method has no PEFT type to an equal one whose method has; return others unchanged."""
    for peft_type in peft_types().values():
        converted = peft_type.convert(adapter)
        if converted is not None:
            return converted
    return adapter


def _write_files(
    adapter: Adapter,
    peft_type: AnyPeftType,
    given: JsonMapping,
    tensors: Mapping[str, Tensor],
    folder: Path,
    view: ModelView | None,
    seals: Mapping[str, str] | None = None,
) -> None:
    original = adapter.provenance.get("config", {})
    config = write_config(adapter.variant, peft_type, given, original if isinstance(original, dict) else {})
    base = compute_base_hash(view, adapter.tensors) if view else adapter.provenance.get("base")
    metadata = {"format": "pt", **(seals or {})} | ({BASE_HASH: base} if base else {})
    write_sealed(folder / WEIGHTS, tensors, metadata, seal_text(config, metadata))
    write_json(folder / CONFIG, config)


@dataclasses.dataclass(frozen=True)
class _FolderWriter:
    """A writer of adapters whose tensors belong to modules.

    Attributes:
        view: the base, if it is given.
        sites: the sites of the model, or of the adapter if no model is given.
        rows: module -> the numbers and values of its separately trained rows.
        experts: the factors of experts that are stored separately, by key without the prefix.
    """

    adapter: Adapter
    peft_type: AnyPeftType
    view: ModelView | None
    sites: Mapping[str, Site]
    rows: Mapping[str, NumberedRows]
    experts: Mapping[str, Tensor]

    def write(self, folder: Path) -> None:
        adapter, peft_type = self.adapter, self.peft_type
        sites = {path: self.sites[path] for path in adapter.tensors}
        matrices = matrix_paths(sites) if "target_parameters" in peft_type.fields else set()
        owners = [site.within for path, site in sites.items() if path not in matrices and site.within is not None]
        for owner in owners:  # a module such as an attention, which PEFT adapts as a whole
            if owner not in sites or owner in matrices or owners.count(owner) == 1:
                raise unsupported_error(
                    f"PEFT adapts all of '{owner}' or nothing, and adapter '{adapter.name}' adapts a part of it",
                    next_step=f"target '{owner}' itself, which names all of it, or use format='native'",
                )
        tied = self._find_ties()
        tensors: dict[str, Tensor] = {}
        variant = adapter.variant
        if peft_type.ordered and self.view is not None:
            exact = dataclasses.replace(
                variant, targets=tuple(adapter.tensors), exclude=(), layers=(), layers_pattern=()
            )
            variant = exact.for_model(self.view)
        for path, parameters in adapter.tensors.items():
            peft_type.check_site(sites[path], parameters)
            if path in matrices:
                continue
            self._check_derived(variant, sites[path])
            for suffix, tensor in peft_type.write_site(variant, sites[path], parameters).items():
                if suffix in peft_type.derived:
                    continue
                shared = suffix.partition(".")[0] in peft_type.shared
                key = (SHARED_PREFIX if shared else f"{PREFIX}{_wrapped_path(sites[path])}.") + suffix
                if not torch.equal(tensors.setdefault(key, tensor), tensor):
                    raise unsupported_error(
                        f"sites of adapter '{adapter.name}' have different '{suffix}', and PEFT has one for all"
                    )
        written = write_matrices(adapter, matrices, self.sites, self.view)
        tensors |= {PREFIX + key: tensor for key, tensor in {**written, **self.experts}.items()}
        if self.view is not None:
            for name, shape in peft_type.shared_shapes(adapter.variant, list(sites.values())).items():
                tensor = tensors[SHARED_PREFIX + name]
                corner = tuple(slice(min(sizes)) for sizes in zip(tensor.shape, shape, strict=True))
                tensors[SHARED_PREFIX + name] = tensor.new_zeros(shape)
                tensors[SHARED_PREFIX + name][corner] = tensor[corner]
        self._refuse_split_embeddings()
        replaced = dict(adapter.replaced)
        if self.view is not None:  # PEFT requires all parameters of a saved module, trained or not
            saved = saved_parameter_names(adapter.variant, self.view)
            replaced = {name: self.view.tensor(name) for name in saved} | replaced
        for name, tensor in replaced.items():
            tensors[PREFIX + self._replaced_key(name, tied)] = tensor
        given = self._targets(matrices, tied)
        if self.experts:
            own: Any = given.get("target_modules", adapter.variant.targets)
            given["target_modules"] = sorted({*own, *(key.split(".")[-3] for key in self.experts)})
        targets = given.get("target_modules", adapter.variant.targets)
        peft_type.check_copies({**adapter.variant.settings, "target_modules": targets}, sites.values(), adapter.tensors)
        given["fan_in_fan_out"] = any(site.transposed for site in sites.values())
        if tied:
            given["ensure_weight_tying"] = True
        if self.rows:
            tensors |= {f"{PREFIX}{path}.{TOKENS}": rows for path, (_, rows) in self.rows.items()}
            given["trainable_token_indices"] = {path: list(numbers) for path, (numbers, _) in self.rows.items()}
        stored = peft_type.name_as_fork(tensors) if type(adapter.variant) in peft_type.read_only else tensors
        _write_files(adapter, peft_type, given, stored, folder, self.view)

    def _check_derived(self, variant: Variant, site: Site) -> None:
        """Refuse parameters of a site that differ from those that PEFT computes from the configuration and the base."""
        adapter, derived = self.adapter, self.peft_type.derived
        tensors = adapter.tensors[site.path]
        kept = {name: tensor for name, tensor in tensors.items() if name not in derived}
        if len(kept) == len(tensors):
            return
        base = self.view.base if self.view else BaseReader(_refuse_base, _refuse_base)
        made = make_site_tensors(variant, adapter.name, site, base, kept)
        for name in (name for name in tensors if name not in kept):
            own, other = tensors[name].cpu(), made[name]
            # In another dtype, factors are rounded; positions are exact.
            slack = 1e-3 * float(other.abs().max()) if own.is_floating_point() else 0.0
            if not torch.allclose(own.double(), other.double(), rtol=0, atol=slack):
                raise unsupported_error(
                    f"'{name}' at '{site.path}' is not the one that PEFT computes from the configuration and the "
                    "base, and its files do not store it"
                )

    def _refuse_split_embeddings(self) -> None:
        """Refuse two different values for a tied embedding, since PEFT loads either into the model's one tensor."""
        adapter = self.adapter
        named = {} if self.view is None else self.view.named_tensors()
        seen: dict[int, str] = {}
        for name in (name for name in adapter.replaced if not is_saved(name, adapter.variant.modules_to_save)):
            other = seen.setdefault(id(named.get(name, name)), name)
            if not torch.equal(adapter.replaced[name], adapter.replaced[other]):
                raise unsupported_error(
                    f"adapter '{adapter.name}' replaces '{other}' and '{name}' by two tensors, and they are one in "
                    "the model",
                    next_step="name their modules in modules_to_save, or use format='native'",
                )

    def _find_ties(self) -> dict[str, str]:
        """Return parameter or site -> the parameter or site that it is tied to, from which PEFT takes its tensors."""
        adapter, peft_type = self.adapter, self.peft_type
        tied = {}
        for name, source in adapter.provenance.get("tied", {}).items():
            if name in adapter.replaced and source in adapter.replaced:
                same = torch.equal(adapter.replaced[name], adapter.replaced[source])
            else:
                same = peft_type.holds_tied(adapter.tensors.get(name, {}), adapter.tensors.get(source, {}))
            if same:
                tied[name] = source
        if self.view is None:
            return tied
        found = peft_type.find_tied_sites(adapter.tensors, self.sites)
        for path, source in found.items():
            if not peft_type.holds_tied(adapter.tensors.get(path, {}), adapter.tensors[source]):
                raise untied_error(adapter.name, path, source)
        return tied | found

    def _replaced_key(self, name: str, tied: Mapping[str, str]) -> str:
        """Return the key of a replaced parameter, without the prefix."""
        variant, adapted = self.adapter.variant, self.adapter.tensors
        module, _, parameter = name.rpartition(".")
        copied = copied_module(variant, name)
        if copied and self.peft_type.copied:
            return f"{copied}.{self.peft_type.copied}{name.removeprefix(copied)}"
        if is_saved(name, variant.modules_to_save) or name in tied:
            return name
        bias = variant.bias if "bias" in self.peft_type.fields else "none"
        if parameter == "bias" and bias != "none" and (bias == "all" or module in adapted):
            return f"{_wrapped_path(self.sites[module])}.{WRAPPED}.bias" if module in adapted else name
        known = frozenset() if self.view is None else embedding_modules(self.view.module)
        if module not in adapted and (module.rpartition(".")[2] in EMBEDDING_NAMES or module in known):
            return name
        raise unsupported_error(
            f"PEFT cannot store '{name}', which adapter '{self.adapter.name}' replaces",
            next_step="name its module in modules_to_save, or use format='native'",
        )

    def _targets(self, matrices: set[str], tied: Mapping[str, str]) -> dict[str, object]:
        """Return fields that make PEFT target exactly the adapter's sites; keep the variant's own fields if they do."""
        variant = self.adapter.variant
        parameters = name_parameters(variant.parameters, matrices, self.sites)
        variant = dataclasses.replace(variant, parameters=parameters)
        wanted = {path for path in self.adapter.tensors if path not in tied}
        # Targeting such a module includes its layers; if a layer were named too, PEFT would wrap it twice.
        inner = {path for path in wanted - matrices if self.sites[path].within not in {None, path}}

        def is_exact(variant: Variant) -> bool:
            return set(select_targets(variant, self.sites, self.view)) == wanted

        # PEFT's "all-linear" depends on the class of the model, and PEFT accepts ``layers`` only with a list.
        filters = {"exclude_modules": variant.exclude, "layers_to_transform": variant.layers}
        has_filters = all(name in self.peft_type.fields for name, value in filters.items() if value)
        has_targets = (
            variant.targets not in TARGET_KEYWORDS
            and not any(is_named(variant.targets, path) for path in inner)
            and not (isinstance(variant.targets, str) and variant.layers)
        )
        given: dict[str, object] = {"target_parameters": list(parameters) or None}
        if has_targets and has_filters and is_exact(variant):
            return given if variant.layers else {**given, "layers_pattern": None}
        paths = tuple(sorted(wanted - inner - matrices))
        suffixes = tuple(sorted({path.rpartition(".")[2] for path in paths}))
        bare = dataclasses.replace(variant, exclude=(), layers=(), layers_pattern=())
        if self.view is not None and is_exact(dataclasses.replace(bare, targets=suffixes)):
            targets: str | list[str] = list(suffixes)
        elif is_exact(dataclasses.replace(bare, targets=paths)):
            targets = list(paths)
        else:
            targets = "|".join(re.escape(path) for path in paths)
        none = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        return {**given, "target_modules": targets, **none}


def _refuse_base(site: Site) -> Tensor:
    raise BaseNeeded(
        f"PEFT makes parameters of '{site.path}' from the base's weight",
        next_step="pass model=, or use format='native'",
    )


def _wrapped_path(site: Site) -> str:
    """Return the part of a site's keys before the suffix."""
    if site.within in {None, site.path}:
        return site.path
    return f"{site.within}.{WRAPPED}{site.path.removeprefix(str(site.within))}"
