"""Files of methods' authors: one file of tensors under the authors' names, and a JSON file of hyper-parameters.

Authors' code saves the tensors, and leaves the hyper-parameters in the arguments of the training command. Those that
the tensors do not show are read from a JSON file, by default one named as the file of tensors with the suffix
``.json``. A missing hyper-parameter raises; lorac guesses none.
"""

import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorac.adapters.base_hash import compute_tensor_hash
from lorac.adapters.fit import check_adapter, sort_by_site
from lorac.argument_types import JsonMapping
from lorac.errors import FormatError, nearest_name, unused_error
from lorac.formats._config_fields import Applied, Field, encode_config, read_fields, write_json
from lorac.formats._errors import corrupt_error, unsupported_error, wrong_method_error
from lorac.formats._format import Format
from lorac.formats._lora_pairs import check_read
from lorac.formats.reading import PICKLES, AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.storage.tensor_file import write_safetensors
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant

Tensors = Mapping[str, Tensor]
REQUIRED = object()
"""Default of a hyper-parameter that no file of tensors holds, and that cannot be guessed."""
_SUFFIXES = (".safetensors", *PICKLES)


@dataclass(frozen=True)
class KeyRow:
    """A parameter of a method, with its key at each site whose path fits a pattern.

    Attributes:
        key: the key in a file, with ``*`` for the part of the path that the key and the site's path share.
        site: the path of the site, with ``*`` for the same part.
        parameter: the name of the parameter at the site.
        is_row: whether the file stores the vector as a matrix of one row.
    """

    key: str
    site: str
    parameter: str
    is_row: bool = False

    def find_site(self, key: str) -> str | None:
        """Return the path of the site that a key belongs to, or None."""
        return _translate(key, self.key, self.site)

    def find_key(self, path: str) -> str | None:
        """Return the key of the parameter at a site, or None where the site's path does not fit the pattern."""
        return _translate(path, self.site, self.key)


def _translate(name: str, pattern: str, other: str) -> str | None:
    before, _, behind = pattern.partition("*")
    shortest = len(before) + len(behind)
    if len(name) <= shortest or not name.startswith(before) or not name.endswith(behind):
        return None
    return other.replace("*", name[len(before) : len(name) - len(behind)])


class AuthorsFormat(Format):
    """The base class of authors' formats.

    Attributes:
        rows: the keys of parameters. A key is read by the first row that it fits; a site is written by the last.
        mark: a pattern that only keys of this format match.
        weights: the name of the file of tensors that lorac writes.
        settings: hyper-parameters that the file of tensors lacks, by the authors' names.
        settings_file: the name of the file of hyper-parameters; None for the name of the tensors' file with ``.json``.
        trained: prefixes of the names of parameters that the training also changes, such as a head's; they are
            replaced.
    """

    rows: ClassVar[tuple[KeyRow, ...]]
    mark: ClassVar[re.Pattern[str]]
    weights: ClassVar[str]
    settings: ClassVar[Mapping[str, Field]] = {}
    settings_file: ClassVar[str | None] = None
    trained: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def make_variant(self, values: JsonMapping, tensors: Mapping[str, Tensors], file: Path) -> Variant:
        """Return the method, with ``values`` and the sizes that the tensors show; ``targets`` are filled in later."""

    def read_tensors(self, file: AdapterFile) -> dict[str, Tensor]:
        """Return the tensors of a file by key."""
        return file.read_tensors()

    def write_tensors(self, file: Path, tensors: Tensors, view: ModelView | None) -> None:
        """Write tensors by key."""
        contiguous = {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}
        if file.suffix == ".safetensors":
            write_safetensors(file, contiguous, {"format": "pt"})
        else:
            torch.save(contiguous, file)

    def is_trained(self, key: str, values: JsonMapping) -> bool:
        """Return whether a key holds a parameter of the base that the training also changes."""
        return key.startswith(self.trained)

    def name_copy(self, key: str) -> str | None:
        """Return the parameter of the base that a key holds a copy of; None where the format stores no copies."""
        return None

    def to_parameters(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert the tensors that a file has for a site to the parameters of the method."""
        return stored

    def to_stored(self, adapter: Adapter, path: str) -> Tensors:
        """Convert the parameters of a site to the tensors that a file has for it; the inverse of ``to_parameters``."""
        return adapter.tensors[path]

    def complete(self, adapter: Adapter, view: ModelView | None) -> None:
        """Add the parameters that no file holds, which the model determines."""

    def describe(self, variant: Variant) -> JsonMapping:
        """Return the hyper-parameters to write."""
        return {name: field.write(getattr(variant, field.to)) for name, field in self.settings.items() if field.to}

    def recognises(self, file: AdapterFile) -> bool:
        found = self.find_file(file)
        return found is not None and any(map(self.mark.search, found.peek_names()))

    def find_file(self, file: AdapterFile) -> AdapterFile | None:
        """Return the file of tensors: the given file, or the only such file in a folder; None where there is none."""
        if file.is_file:
            return file if file.suffix in _SUFFIXES else None
        found = [name for name in file.names if name.endswith(_SUFFIXES)]
        return file.inside(found[0]) if len(found) == 1 else None

    def read(self, file: AdapterFile, view: ModelView | None, name: str | None) -> Adapter:
        found = self.find_file(file)
        if found is None:
            raise corrupt_error(f"'{file}' holds no file of tensors, or several")
        path = found.path
        settings_path = self.settings_path(path)
        settings = AdapterFile(settings_path)
        raw = settings.read_json() if settings.is_file else {}
        lost = [name for name, field in self.settings.items() if field.default is REQUIRED and name not in raw]
        if lost:
            example = encode_config({**raw, **dict.fromkeys(lost, 1)})
            raise unsupported_error(
                f"'{path}' does not hold {', '.join(lost)}, settings of its training that change the result",
                next_step=f"write them into '{settings_path}' as JSON, with the values of the training: {example}",
            )
        values = read_fields(raw, self.settings, settings_path)
        stored, rest = self._assign(self.read_tensors(found))
        if not stored:
            raise corrupt_error(f"'{path}' holds no tensor of {self.written_by}")
        adapter = Adapter(name or file.adapter_name, self.make_variant(values, stored, path), stored)
        adapter.provenance |= {"format": self.name, "source": str(file), "config": raw}
        self._account(path, adapter, rest, values)
        placed = {_locate(site, view): tensors for site, tensors in stored.items()}
        adapter.tensors = {site: self.to_parameters(dict(tensors)) for site, tensors in placed.items()}
        saved = adapter.variant.modules_to_save or sorted({name.partition(".")[0] for name in adapter.replaced})
        targets = tuple(sort_by_site(placed, view))
        adapter.variant = replace(adapter.variant, targets=targets, modules_to_save=tuple(saved))
        self.complete(adapter, view)
        adapter.tensors = sort_by_site(adapter.tensors, view)
        return check_read(adapter, view)

    def settings_path(self, file: Path) -> Path:
        """Return the path of the file of hyper-parameters."""
        return file.with_suffix(".json") if self.settings_file is None else file.with_name(self.settings_file)

    def _assign(self, tensors: Tensors) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Return the tensors of sites by path and parameter, and the tensors that fit no row of ``rows``."""
        stored: dict[str, dict[str, Tensor]] = {}
        rest: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            row = next((row for row in self.rows if row.find_site(key)), None)
            path = None if row is None else row.find_site(key)
            if row is None or path is None or row.parameter in stored.get(path, {}):
                rest[key] = tensor
            else:
                is_row = row.is_row and tensor.ndim == 2 and len(tensor) == 1
                stored.setdefault(path, {})[row.parameter] = tensor[0] if is_row else tensor
        return stored, rest

    def _account(self, file: Path, adapter: Adapter, rest: Tensors, values: JsonMapping) -> None:
        """Add replacements to the adapter, and record a hash of each copy of the base; refuse any other tensor."""
        sites = [*adapter.tensors]
        for key, tensor in rest.items():
            copied = self.name_copy(key)
            if self.is_trained(key, values):
                adapter.replaced[key] = tensor
            elif copied is not None:
                adapter.provenance.setdefault("copies", {})[copied] = compute_tensor_hash(tensor)
            else:
                expected = [row.key.replace("*", "…") for row in self.rows]
                raise unused_error(
                    f"'{file}' holds '{key}', which is not a tensor of {self.written_by}",
                    nearest=nearest_name(key, [name for row in self.rows for name in map(row.find_key, sites) if name]),
                    next_step=f"keys are {', '.join(expected)}",
                )

    def write(self, adapter: Adapter, path: Path, view: ModelView | None, target: Path) -> None:
        """Write the file of tensors into a folder, and the file of hyper-parameters where the format has any.

        Raises:
            FormatError: the format has no place for the method, a site, a parameter or a replacement.
        """
        if type(adapter.variant) not in self.methods:
            raise wrong_method_error(adapter, self.name, " or ".join(method.name for method in self.methods))
        check_adapter(adapter, view)
        tensors: dict[str, Tensor] = {}
        settings = self.describe(adapter.variant)
        for name, tensor in adapter.replaced.items():
            if not self.is_trained(name, settings):
                raise self._no_place(adapter, f"the replacement of '{name}'")
            tensors[name] = tensor
        tensors |= self._name_tensors(adapter)
        path.mkdir()
        self.write_tensors(path / self.weights, tensors, view)
        if self.settings:
            write_json(self.settings_path(path / self.weights), settings)

    def _name_tensors(self, adapter: Adapter) -> dict[str, Tensor]:
        named = {}
        for site in adapter.tensors:
            for parameter, tensor in self.to_stored(adapter, site).items():
                rows = [row for row in self.rows if row.parameter == parameter and row.find_key(site)]
                if not rows:
                    raise self._no_place(adapter, f"'{parameter}' at '{site}'")
                named[str(rows[-1].find_key(site))] = tensor[None] if rows[-1].is_row else tensor
        return named

    def _no_place(self, adapter: Adapter, content: str) -> FormatError:
        places = dict.fromkeys(row.site.replace("*", "…") for row in self.rows)
        return unsupported_error(
            f"the format '{self.name}' cannot store {content} of adapter '{adapter.name}'",
            next_step=f"use format='native', which stores every adapter; this one has layers at {', '.join(places)}",
        )


def _locate(path: str, view: ModelView | None) -> str:
    """Return the path of a site in a model of several components, given the path within one component."""
    if view is None or path in view.sites:
        return path
    return next((inner for inner in (f"{name}.{path}" for name in view.components) if inner in view.sites), path)


def required(to: str, read: Any) -> Field:
    """Return the field of a required hyper-parameter."""
    return Applied(REQUIRED, to=to, read=read)


def find_size(tensors: Mapping[str, Tensors], parameter: str, axis: int, file: Path, axes: int = 1) -> int:
    """Return the size of a parameter along an axis, which must be the same at every site.

    Args:
        axes: the minimum number of axes of the parameter.

    Raises:
        FormatError: the size differs between sites, or the parameter is missing at a site or has fewer axes.
    """
    sizes: dict[int, str] = {}
    for path, stored in tensors.items():
        if parameter not in stored or stored[parameter].ndim < max(axes, axis + 1):
            raise corrupt_error(f"'{file}' lacks {parameter} at '{path}', or that tensor has too few axes")
        sizes.setdefault(stored[parameter].shape[axis], path)
    if len(sizes) > 1:
        (first, here), (second, there), *_ = sizes.items()
        raise unsupported_error(
            f"{parameter} in '{file}' has the size {first} at '{here}' and {second} at '{there}'",
            next_step="copy or download the file again; the authors' code has one size for all",
        )
    return next(iter(sizes))
