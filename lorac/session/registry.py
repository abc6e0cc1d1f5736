"""Adapters that stay on disk: registered by their headers, and read when they are used.

A registered adapter takes a few hundred bytes of memory. Registration checks everything except values: sites, shapes
and configuration, and whether the adapter fits the program. Files with equal headers are checked once. When the adapter
is used, its file is read and checked like any other; if its headers were checked before, only its values are
(``lorac.formats.AdapterOutline``).
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lorac.adapters.stored import AdapterStructure, StoredAdapter
from lorac.errors import FormatError
from lorac.formats import AdapterOutline, is_adapter, load_adapter, outline_adapter, read_values
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.ir.algebra.changes import LowRank
from lorac.ir.slots.plans import PreparedAdapter
from lorac.runtime.capacity import check_capacity
from lorac.session.adapter_loading import add_sites, outline_adapter_forms
from lorac.session.session import Session
from lorac.storage.open_file import OpenFile
from lorac.storage.paths import translate_os_errors
from lorac.storage.remote import find_source
from lorac.variants.adapter import Adapter

_MOST_CHECKED, _MOST_OUTLINES = 10_000, 32
"""The most headers to cache, and the most outlines of adapters; an outline takes some 100 kB."""


@dataclass(frozen=True)
class AdapterSize:
    """The size of an adapter in a model.

    Attributes:
        sites: the number of sites.
        rank: the largest rank of a low-rank change; 0 if it has none.
        invocation: the token ids from which on the adapter acts (aLoRA); empty: it acts on every token.
        headers: the hash of its file's headers (``AdapterFile.hash_headers``).
    """

    sites: int
    rank: int
    invocation: tuple[int, ...]
    headers: bytes

    @classmethod
    def of(cls, forms: PreparedAdapter, headers: bytes) -> "AdapterSize":
        """Return the size of an adapter in its normal forms."""
        ranks = [change.rank for change in forms.changes.values() if isinstance(change, LowRank)]
        return cls(len(forms.paths), max(ranks, default=0), forms.invocation, headers)


class AdapterRegistry:
    """A compiled model's registered adapters, which are on disk.

    Args:
        session: the session of the compiled model.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._view: ModelView | None = None
        self._checked: dict[bytes, AdapterSize] = {}
        self._outlines: dict[bytes, AdapterOutline] = {}

    @property
    def view(self) -> ModelView:
        """The model with its sites, which are found once for all adapters."""
        module = self._session.host.module if self._view is None else self._view.module
        if self._view is None or self._view.sites is not self._session.sites:
            self._view = dataclasses.replace(self._session.view, module=module)
        return self._view

    def register(self, folder: str | os.PathLike[str]) -> list[str]:
        """Register every adapter in a folder under the name of its file or folder; return the names, sorted.

        Raises:
            FormatError, AdapterError, SiteError: the folder has no adapter, or an adapter does not fit the model; then
                no adapter is registered.
            NeedsRecompile: an adapter does not fit the reserved slots.
        """
        path = find_source(folder, "the folder of register", FormatError, "unreadable")
        with translate_os_errors(path, FormatError, "read", "unreadable"):
            adapters = filter(is_adapter, sorted(path.iterdir()))
            found = {inner.name if inner.is_dir() else inner.stem: inner for inner in adapters}
            if not found:
                raise FormatError(
                    f"there are no adapters in '{path}'",
                    next_step="give the folder that holds them, one file or folder each",
                    code="unknown_format",
                )
            stored = {name: StoredFile(self, str(inner), *self._check(name, inner)) for name, inner in found.items()}
        self._session.pool.register(stored)
        return list(stored)

    def register_file(self, path: Path, name: str, digest: str) -> AdapterSize:
        """Register an adapter of one file, which is read only if it has the digest (``OpenFile.digest``).

        Raises:
            FormatError, AdapterError, SiteError, NeedsRecompile: as for ``register``.
        """
        with translate_os_errors(path, FormatError, "read", "unreadable"):
            size, nbytes = self._check(name, path)
        self._session.pool.register({name: StoredFile(self, str(path), size, nbytes, digest)})
        return size

    def _check(self, name: str, path: Path) -> tuple[AdapterSize, int]:
        """Check everything of an adapter except its values, unless equal headers were checked before.

        Returns:
            Its size, and the bytes of its tensors.
        """
        self._session.pool.check_name_free(name)
        headers, nbytes = AdapterFile(path).hash_headers()
        if headers not in self._checked:
            outline = outline_adapter(path, self.view, name)
            add_sites(self._session, outline.adapter)
            forms = outline_adapter_forms(self._session, _with_zeros(outline.adapter))
            check_capacity(name, forms, self._session.plans, self._session.sites)
            if len(self._checked) >= _MOST_CHECKED:
                self._checked.clear()
            self._checked[headers], self._outlines[headers] = AdapterSize.of(forms, headers), outline
            for oldest in list(self._outlines)[:-_MOST_OUTLINES]:
                del self._outlines[oldest]
        return self._checked[headers], nbytes

    def read(self, path: Path, name: str) -> Adapter:
        """Read a registered adapter: only its values, if equal headers were checked before.

        Raises:
            FormatError, AdapterError, SiteError: as ``load_adapter``.
        """
        found = read_values(path, self._outlines)
        if found is None:
            return load_adapter(path, self.view, name)
        adapter = found[0].make_adapter(name, found[1])
        adapter.provenance |= {"source": str(path)}
        return adapter

    def find_structure(self, headers: bytes) -> AdapterStructure | None:
        """Return the structure of adapters with these headers, if it is cached and their values can be read alone."""
        outline = self._outlines.get(headers)
        return None if outline is None or outline.sites is None else outline

    def read_values(self, path: Path, structure: AdapterStructure) -> torch.Tensor | None:
        """Read the values of an adapter; return None if it has another structure.

        Raises:
            FormatError, AdapterError: as ``load_adapter``.
        """
        found = read_values(path, self._outlines)
        return None if found is None or found[0] is not structure else found[1]


class StoredFile(StoredAdapter):
    """An adapter's file or folder.

    Args:
        registry: reads the adapter.
        path: the path of the file or folder.
        size: the adapter's size in the model.
        nbytes: the bytes of its tensors.
        digest: the digest that the file must have; None: any file that fits the model.
    """

    __slots__ = ("_digest", "_headers", "_path", "_registry")

    def __init__(
        self, registry: AdapterRegistry, path: str, size: AdapterSize, nbytes: int, digest: str | None = None
    ) -> None:
        self.invocation, self._headers = size.invocation, size.headers
        self._registry, self._path, self.nbytes, self._digest = registry, path, nbytes, digest

    @property
    def folder(self) -> Path:
        return Path(self._path).parent

    @property
    def structure(self) -> AdapterStructure | None:
        return self._registry.find_structure(self._headers)

    def read_values(self, structure: AdapterStructure) -> torch.Tensor | None:
        with self._open() as path:
            return self._registry.read_values(path, structure)

    def read(self, name: str) -> Adapter:
        with self._open() as path:
            return self._registry.read(path, name)

    @contextlib.contextmanager
    def _open(self) -> Iterator[Path]:
        """Yield a path at which the block reads only the registered file."""
        if self._digest is None:
            yield Path(self._path)
            return
        with translate_os_errors(self._path, FormatError, "read", "unreadable"):
            file = OpenFile(Path(self._path))
        if file.digest() != self._digest:
            raise FormatError(f"'{self._path}' was changed since it was registered", code="corrupt_file")
        with file.named() as path:
            yield path


def _with_zeros(adapter: Adapter) -> Adapter:
    """Return an adapter with zeros in place of values that were not read."""

    def filled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(t.shape, dtype=t.dtype) if t.is_meta else t for name, t in tensors.items()}

    tensors = {path: filled(at) for path, at in adapter.tensors.items()}
    return Adapter(adapter.name, adapter.variant, tensors, filled(adapter.replaced), dict(adapter.provenance))
