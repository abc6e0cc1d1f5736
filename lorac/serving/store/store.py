"""The store: adapters that tenants upload, load and unload while a server runs."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lorac.argument_types import JsonMapping, check_type
from lorac.errors import (
    AdapterError,
    AdapterNotFound,
    FormatError,
    LoracError,
    nearest_name,
    replace_in_errors,
    short,
    warn,
)
from lorac.formats.native import read_record
from lorac.formats.peft.writer import CONFIG, WEIGHTS
from lorac.limits import budget
from lorac.serving.settings import StoreQuotas
from lorac.serving.store.intake import copy_files, open_files
from lorac.serving.store.quotas import QuotaClaim, TenantAccount
from lorac.serving.store.reading_main import WEAKER
from lorac.serving.store.reading_process import ReaderPool
from lorac.serving.store.store_folder import AuditLog, StoredName, StoreFolder
from lorac.storage.open_file import OpenFile
from lorac.storage.paths import parse_path, translate_os_errors
from lorac.storage.remote import HubName, find_source, parse_name

if TYPE_CHECKING:
    from lorac.serving.ray.worker_calls import RemoteAdapterHolder
    from lorac.session.compiled import Compiled

_OVERHEAD = 1 << 20
"""Bytes by which a rewritten adapter may be larger than the upload."""

_Files = AbstractContextManager[Mapping[str, BinaryIO]]
"""A context manager that opens the files of an adapter, by name."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
"""A name that may become part of paths, log lines and requests."""


@dataclass(frozen=True, slots=True)
class TenantAdapter:
    """An adapter that a tenant may use.

    Attributes:
        name: the tenant's name for the adapter.
        key: the adapter's name in the compiled model, which no tenant can request.
        digest: the digest of the stored file; empty for the compiled model's own adapters, which all tenants share.
        nbytes: the size of the stored file.
    """

    name: str
    key: str
    digest: str = ""
    nbytes: int = 0


@dataclass(frozen=True)
class _Tenant:
    """A tenant's adapters by name, and its account."""

    account: TenantAccount
    adapters: dict[str, TenantAdapter] = field(default_factory=dict)

    def has_digest(self, digest: str) -> bool:
        return any(adapter.digest == digest for adapter in self.adapters.values())


class AdapterStore(AbstractContextManager["AdapterStore"]):
    """A store of adapters that tenants upload to a server. Threads may share it; only one process may use its folder.

    An upload is PEFT's files or one file in lorac's own format. Another process, with limits, rewrites it, and the
    store keeps only the new file. An adapter must be for the base weights of the compiled model. A tenant neither sees
    nor reaches another tenant's adapters. Adapters that the compiled model has when the store is made are for all.

    Args:
        compiled: the compiled model, with room for the adapters (``reserve=``).
        folder: the folder of the adapters' files; a later store over it has the same adapters.
        quotas: the quotas of each tenant; default: ``StoreQuotas()``.
        bases: names by which PEFT's configurations call the model, for files that do not record a hash of the base.
        reserved: names that no adapter may have, such as the model's own name.
        sources: patterns of the places from which ``load`` may take adapters by name, such as ``hf:user/*`` or
            ``s3://bucket/*``; default: no place. An asterisk matches any text.

    Raises:
        ArtifactError: another process uses the folder, or it cannot be written.
        Unavailable: the compiled model is baked.
    """

    def __init__(
        self,
        compiled: Compiled | RemoteAdapterHolder,
        folder: str | os.PathLike[str],
        *,
        quotas: StoreQuotas | None = None,
        bases: Collection[str] = (),
        reserved: Collection[str] = (),
        sources: Collection[str] = (),
    ) -> None:
        compiled.refuse_baked()
        path = parse_path(folder, "the folder of a store", FormatError, "unreadable").absolute()
        self._compiled, self._quotas, self._bases = compiled, quotas or StoreQuotas(), frozenset(bases)
        self._sources = tuple(sources)
        self._shared = {name: TenantAdapter(name, name) for name in compiled.pool}
        self._reserved = self._shared.keys() | set(reserved)
        self._tenants: dict[str, _Tenant] = {}
        self._lock = threading.RLock()
        with translate_os_errors(path, FormatError, "written", "unreadable"):
            self._folder = StoreFolder(path)
        if WEAKER:
            warn(
                f"readers of uploads have no limit {WEAKER} on this system",
                next_step="run a server that strangers reach on Linux",
            )
        self._audit = AuditLog(path / "audit.jsonl")
        self._readers = ReaderPool(self._quotas)
        for entry in self._folder.scan():
            self._restore(entry)

    def adapters(self, tenant: str) -> list[TenantAdapter]:
        """Return the adapters that a tenant may use: its own, sorted by name, then the adapters that all share."""
        own = self._tenants.get(tenant)
        found = {} if own is None else dict(own.adapters)
        return [*(found[name] for name in sorted(found)), *self._shared.values()]

    def names(self, tenant: str) -> list[str]:
        """Return the names of the adapters that a tenant may use."""
        return [adapter.name for adapter in self.adapters(tenant)]

    def find(self, tenant: str, name: str) -> str:
        """Return the name that an adapter of a tenant has in the compiled model.

        Raises:
            AdapterNotFound: the tenant has no such adapter, even if another tenant has.
        """
        return self._find(tenant, name).key

    def _find(self, tenant: str, name: str) -> TenantAdapter:
        own = self._tenants.get(tenant)
        names: Mapping[str, TenantAdapter] = {} if own is None else own.adapters
        found = (names.get(name) or self._shared.get(name)) if isinstance(name, str) else None
        if found is not None:
            return found
        raise AdapterNotFound(
            f"no adapter is called {short(name)}",
            nearest=nearest_name(str(name)[:100], [*self._shared, *names]),
            next_step="upload it first, or list the adapters that there are",
        )

    def check_upload(self, tenant: str, nbytes: int) -> None:
        """Check that a tenant may upload ``nbytes`` bytes now, before they are received.

        Raises:
            AdapterError: the tenant's name is not valid in the store.
            OverBudget: the tenant uploads too often, or has no quota for the bytes.
        """
        self._open_account(tenant).account.check_upload(nbytes)

    def upload(
        self, tenant: str, name: str, files: Mapping[str, BinaryIO], *, base: str | None = None
    ) -> TenantAdapter:
        """Store an adapter and register it, wholly or not at all.

        Uploading the same adapter again succeeds; another adapter under its name is refused.

        Args:
            tenant: the tenant that will own it.
            name: the tenant's name for it.
            files: ``adapter_config.json`` and ``adapter_model.safetensors``, or one file in lorac's own format.
            base: the hash of the base weights, if the files do not record it.

        Raises:
            AdapterError: the name is invalid or taken; or the adapter has values that are not finite, is for other base
                weights, does not record its base weights, or is larger than the quotas allow.
            FormatError, SiteError, NeedsRecompile: as for ``compiled.add_adapter``; or reading exceeds a limit.
            OverBudget: the tenant has used up its quotas.
        """
        with self._audit.record("upload", tenant, name) as line:
            return self._add(tenant, name, contextlib.nullcontext(files), base, line)

    def load(self, tenant: str, name: str, path: str) -> TenantAdapter:
        """Store an adapter as ``upload`` does, from a path below ``incoming/<tenant>`` or a name in an admitted source.

        Raises:
            FormatError: the path leaves that folder or passes through a link, or no admitted source matches the name.
            LoracError: as ``upload``.
        """
        with self._audit.record("load", tenant, name) as line:
            line["path"] = short(path)
            check_name("a tenant", tenant)
            return self._add(tenant, name, self._open(tenant, path), None, line)

    @contextlib.contextmanager
    def _open(self, tenant: str, path: str) -> Iterator[dict[str, BinaryIO]]:
        """Open the files of an adapter, at a path in the tenant's folder or under a name in an admitted source."""
        place = parse_name(path) if self._sources and isinstance(path, str) else None
        if place is None or (self._folder.incoming(tenant) / path).exists():
            with open_files(self._folder.incoming(tenant), path) as files:
                yield files
            return
        self._admit(place)
        with budget(download=self._quotas.bytes), contextlib.ExitStack() as stack:
            found = find_source(path, "the adapter's path", FormatError, "unreadable", self._admit)
            paths = [found] if found.is_file() else [found / CONFIG, found / WEIGHTS]
            yield {one.name: stack.enter_context(one.open("rb")) for one in paths}

    def _admit(self, place: HubName | str) -> None:
        origin = f"hf:{place}" if isinstance(place, HubName) else place
        if not any(fnmatch.fnmatchcase(origin, pattern) for pattern in self._sources):
            step = f"it loads from {', '.join(self._sources)}"
            raise FormatError(f"this server loads nothing from {short(origin)}", next_step=step, code="unreadable")

    def unload(self, tenant: str, name: str) -> None:
        """Remove an adapter of a tenant; running requests keep it until they end.

        Raises:
            AdapterNotFound: the tenant has no such adapter of its own.
        """
        with self._audit.record("unload", tenant, name) as line, self._lock:
            found = self._find(tenant, name)
            if not found.digest:
                raise AdapterError(
                    f"adapter '{name}' is for all tenants", next_step="ask the server's operator to remove it"
                )
            line["digest"] = found.digest
            own = self._tenants[tenant]
            with translate_os_errors(self._folder.path, FormatError, "written", "unreadable"):
                self._folder.remove_name(StoredName(tenant, name, found.digest))
            del own.adapters[name]
            own.account.add(adapters=-1)
            if not own.has_digest(found.digest):
                self._compiled.remove_adapter(found.key)
                self._folder.discard(tenant, found.digest)
                own.account.add(nbytes=-found.nbytes)

    def close(self) -> None:
        """End the processes that read uploads, and let another process use the folder; the adapters stay."""
        self._readers.close()
        self._folder.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, tenant: str, name: str, source: _Files, base: str | None, line: dict[str, object]) -> TenantAdapter:
        own = self._open_account(tenant)
        if check_name("an adapter", name) in self._reserved:
            raise AdapterError(f"the name '{name}' is reserved", next_step="choose another", code="adapter_exists")
        if base is not None:
            check_type(base, str, "the hash of the base weights", next_step="give the text that lorac recorded")
        own.account.count_upload()
        failure = translate_os_errors(self._folder.path, FormatError, "written", "unreadable")
        with failure, own.account.claim() as claim, self._folder.workshop() as folder:
            claim.take(adapters=int(name not in own.adapters))
            with source as files:
                size = copy_files(files, folder, claim)
            with self._readers.take() as reader:
                staged = reader.rewrite(folder, base, size + _OVERHEAD)
            opened = OpenFile(staged)
            line["digest"], line["bytes"] = digest, nbytes = opened.digest(), opened.size
            del opened  # Windows moves no file that is open
            claim.take(nbytes=nbytes - size)
            added = TenantAdapter(name, f"{tenant}/{digest}", digest, nbytes)
            with self._lock:
                return self._install(own, tenant, added, staged, claim)

    def _open_account(self, tenant: str) -> _Tenant:
        check_name("a tenant", tenant)
        with self._lock:
            return self._tenants.setdefault(tenant, _Tenant(TenantAccount(tenant, self._quotas)))

    def _install(
        self, own: _Tenant, tenant: str, added: TenantAdapter, staged: Path, claim: QuotaClaim
    ) -> TenantAdapter:
        """Move an adapter into the folder, register it in the compiled model, and store its name."""
        known = own.adapters.get(added.name)
        if known is not None and known.digest != added.digest:
            raise AdapterError(
                f"another adapter is called '{added.name}'", next_step="unload it first", code="adapter_exists"
            )
        if known is not None:
            return known
        claim.take(adapters=1 - claim.adapters)  # 0, unless the name was unloaded since the upload began
        is_new = not own.has_digest(added.digest)
        if is_new:
            self._folder.place(tenant, added.digest, staged)
        try:
            if is_new:
                self._register(tenant, added)
            self._folder.add_name(StoredName(tenant, added.name, added.digest))
        except BaseException:
            if is_new:
                self._forget(tenant, added)
            raise
        own.adapters[added.name] = added
        claim.keep(nbytes=added.nbytes if is_new else 0)
        return added

    def _register(self, tenant: str, added: TenantAdapter) -> None:
        """Register a stored file; refuse it if it is not for the model, or is larger than the quotas allow."""
        path = self._folder.file_of(tenant, added.digest)
        check_base_is_known(added.name, read_record(path), self._bases)
        with replace_in_errors(added.key, added.name):
            size = self._compiled.register_file(path, added.key, added.digest)
        self._quotas.check_size(added.name, size)

    def _forget(self, tenant: str, added: TenantAdapter) -> None:
        if added.key in self._compiled.pool:
            self._compiled.remove_adapter(added.key)
        self._folder.discard(tenant, added.digest)

    def _restore(self, entry: StoredName) -> None:
        """Register an adapter of the folder; the store omits a refused adapter, but its files stay."""
        path = self._folder.file_of(entry.tenant, entry.digest)
        try:
            own = self._open_account(entry.tenant)
            nbytes = path.stat().st_size
            added = TenantAdapter(
                check_name("an adapter", entry.name), f"{entry.tenant}/{entry.digest}", entry.digest, nbytes
            )
            is_new = not own.has_digest(entry.digest)
            if is_new:
                self._register(entry.tenant, added)
        except (LoracError, OSError) as error:
            warn(f"adapter '{entry.name}' of tenant '{entry.tenant}' is left out: {error}")
            return
        own.account.add(nbytes=nbytes if is_new else 0, adapters=1)
        own.adapters[entry.name] = added


def check_base_is_known(name: str, record: JsonMapping, bases: Collection[str]) -> None:
    """Refuse an adapter that does not say which base weights it is for.

    Args:
        name: the adapter's name, for messages.
        record: the record of its file; a hash in it is compared with the weights when the adapter is registered.
        bases: names by which PEFT's configurations may call the base instead.

    Raises:
        AdapterError: the record has no hash, and names none of these bases.
    """
    named = record["provenance"].get("config", {}).get("base_model_name_or_path")
    if record["base"] or named in bases:
        return
    fault = "does not say which base weights it is for" if not named else f"is for the base {short(named)}"
    raise AdapterError(
        f"adapter '{name}' {fault}",
        next_step="save it with lorac.save_adapter(..., model=...), which records a hash, or send the hash along",
        code="base_mismatch",
    )


def check_name(subject: str, name: object) -> str:
    """Return a name if it is valid.

    Args:
        subject: the owner of the name, for the message: "an adapter".

    Raises:
        AdapterError: the name is not text, is too long, or has a character that paths or logs could misread.
    """
    if isinstance(name, str) and _NAME.fullmatch(name):
        return name
    raise AdapterError(
        f"{subject} cannot be called {short(name)}",
        next_step="give 1 to 64 letters, digits, '.', '_' and '-', with a letter or digit first",
    )
