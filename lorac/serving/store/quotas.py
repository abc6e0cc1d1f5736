"""Tenants' use of their quotas."""

import collections
import contextlib
import threading
import time
from collections.abc import Iterator

from lorac.errors import OverBudget
from lorac.serving.settings import StoreQuotas

_MINUTE = 60.0


class TenantAccount:
    """A tenant's use of its quotas. Threads may share it.

    Args:
        tenant: the tenant's name, for messages.
        quotas: the tenant's quotas.
    """

    def __init__(self, tenant: str, quotas: StoreQuotas) -> None:
        self._tenant, self._quotas, self._lock = tenant, quotas, threading.Lock()
        self._uploads: collections.deque[float] = collections.deque()
        self.bytes, self.adapters = 0, 0

    def count_upload(self) -> None:
        """Count an upload.

        Raises:
            OverBudget: the tenant uploads too often; then the upload is not counted.
        """
        self.check_upload()
        with self._lock:
            self._uploads.append(time.monotonic())

    def check_upload(self, nbytes: int = 0) -> None:
        """Check that the tenant may upload now, and has quota for ``nbytes`` more bytes.

        Raises:
            OverBudget: the tenant uploads too often, or has no such quota.
        """
        with self._lock:
            now, most = time.monotonic(), self._quotas.uploads_per_minute
            while self._uploads and self._uploads[0] <= now - _MINUTE:
                self._uploads.popleft()
            if len(self._uploads) >= most:
                wait = self._uploads[0] + _MINUTE - now
                raise OverBudget(
                    f"tenant '{self._tenant}' has uploaded {most} times within a minute, the most that it may",
                    next_step=f"upload again in {wait:.0f} s",
                    code="too_many_uploads",
                )
            self._check(nbytes, self.bytes, self._quotas.bytes, "bytes")

    def add(self, *, nbytes: int = 0, adapters: int = 0) -> None:
        """Add to the used bytes and adapters without a check of the quotas; negative numbers give quota back."""
        with self._lock:
            self.bytes += nbytes
            self.adapters += adapters

    def take(self, *, nbytes: int = 0, adapters: int = 0) -> None:
        """Take quota for bytes and adapters.

        Raises:
            OverBudget: the tenant would exceed its quotas; then nothing is taken.
        """
        with self._lock:
            self._check(nbytes, self.bytes, self._quotas.bytes, "bytes")
            self._check(adapters, self.adapters, self._quotas.adapters, "adapters")
            self.bytes += nbytes
            self.adapters += adapters

    def _check(self, taken: int, used: int, most: int, what: str) -> None:
        if taken > 0 and used + taken > most:
            raise OverBudget(
                f"tenant '{self._tenant}' may have {most} {what}, and this would make {used + taken}",
                next_step="unload adapters that are not needed",
                code="quota_full",
            )

    @contextlib.contextmanager
    def claim(self) -> "Iterator[QuotaClaim]":
        """Reserve quota for the block; the unused part is refunded."""
        claim = QuotaClaim(self)
        try:
            yield claim
        finally:
            self.add(nbytes=-claim.nbytes, adapters=-claim.adapters)


class QuotaClaim:
    """The quota that is reserved for an upload until it is stored.

    Args:
        account: the account of the tenant.
    """

    def __init__(self, account: TenantAccount) -> None:
        self._account, self.nbytes, self.adapters = account, 0, 0

    def take(self, *, nbytes: int = 0, adapters: int = 0) -> None:
        """Reserve more quota; raises as ``TenantAccount.take``."""
        self._account.take(nbytes=nbytes, adapters=adapters)
        self.nbytes += nbytes
        self.adapters += adapters

    def keep(self, nbytes: int) -> None:
        """Keep all reserved adapters and ``nbytes`` of the reserved bytes as used, so that they are not refunded."""
        self.nbytes -= nbytes
        self.adapters = 0
