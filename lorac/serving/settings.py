"""The settings of a server, and the quotas of its tenants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lorac.argument_types import Count, Positive, check_fields
from lorac.errors import AdapterError

if TYPE_CHECKING:
    from lorac.session.registry import AdapterSize


@dataclass(frozen=True)
class ServingSettings:
    """The settings of a server.

    Attributes:
        rows: the most requests that run at once.
        waiting: the most requests that wait.
        chunk: the most tokens of each prompt per step; None: chosen by timing the model, as ``lorac.Scheduler`` does.
        base_name: the name of the model without adapters, in requests and in ``/v1/models``.
        keys: API key -> tenant; without keys, every client may send requests.
        max_body_bytes: the most bytes of a request, not counting uploads and images.
        max_images: the most images of a request.
        max_image_bytes: the most bytes of a request's images together.
        max_image_pixels: the most pixels of a request's images together.
        max_upload_bytes: the most bytes of an upload of an adapter.
        max_spool_bytes: the most bytes of all uploads and images that are being received; one tenant gets at most half.
        max_connections: the most connections; one tenant's requests get at most half.
        header_timeout: seconds within which a connection must send its first and every further request.
        body_timeout: seconds for a request's body, plus the time of its bytes at 64 KiB per second.
        max_new_tokens: the most tokens of an answer, and the default for chats.
        deadline: seconds after which a request ends, its waiting time included; None: no deadline.
        grace: seconds that running requests get to finish when ``lorac serve`` is to stop.
        pinned: adapters that stay in memory and cannot be unloaded.
        sources: patterns of the places from which ``/v1/load_lora_adapter`` loads adapters by name, such as
            ``hf:user/*`` or ``s3://bucket/*``; without patterns, it loads no names.
        predict: whether ``/v1/predict`` returns the model's outputs; None: unless the model continues text.
        max_output_bytes: the most bytes of outputs that ``/v1/predict`` returns.
        page: whether ``/`` is a page to chat on.
        memory: the most bytes of adapters and caches (``compiled.memory.limit``); None: no limit.
        pooling: an embedding is the mean of an encoder's last hidden states, or (``cls``) the first.
    """

    rows: Count = 8
    waiting: Count = 64
    chunk: Count | None = None
    base_name: str = "base"
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    max_body_bytes: Count = 1 << 20
    max_images: Count = 8
    max_image_bytes: Count = 4 << 20
    max_image_pixels: Count = 1 << 24
    max_upload_bytes: Count = 256 << 20
    max_spool_bytes: Count = 1 << 30
    max_connections: Count = 512
    header_timeout: Positive = 10.0
    body_timeout: Positive = 30.0
    max_new_tokens: Count = 1024
    deadline: Positive | None = None
    grace: Positive = 150.0
    pinned: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    predict: bool | None = None
    max_output_bytes: Count = 16 << 20
    page: bool = True
    memory: Count | None = None
    pooling: Literal["mean", "cls"] = "mean"

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class StoreQuotas:
    """The quotas of each tenant of a store.

    Attributes:
        bytes: the most bytes of all files, uploads in progress included; equal files count once.
        adapters: the most names of adapters.
        rank: the largest rank of an adapter.
        sites: the most sites of an adapter.
        uploads_per_minute: the most uploads within a minute, refused uploads included.
        seconds: the most processor time for reading an upload.
        memory: the most bytes of memory for reading an upload.
    """

    bytes: Count = 1 << 30
    adapters: Count = 100
    rank: Count = 64
    sites: Count = 1000
    uploads_per_minute: Count = 10
    seconds: Positive = 10.0
    memory: Count = 1 << 30

    def __post_init__(self) -> None:
        check_fields(self)

    def check_size(self, name: str, size: AdapterSize) -> None:
        """Refuse an adapter that is too large.

        Raises:
            AdapterError: the adapter has more sites, or a larger rank, than the quotas allow.
        """
        rank = size.rank > self.rank
        if rank or size.sites > self.sites:
            what, most = (f"rank {size.rank}", self.rank) if rank else (f"{size.sites} sites", self.sites)
            step = f"the most that this server admits is {most}"
            raise AdapterError(f"adapter '{name}' has {what}", next_step=step, code="over_quota")
