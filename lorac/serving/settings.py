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
        rows: the most requests at work.
        waiting: the most requests that wait.
        chunk: the most tokens of each prompt per step; None: chosen by timing the model, as ``lorac.Scheduler`` does.
        base_name: the name of the model without adapters, in requests and in ``/v1/models``.
        keys: API key -> tenant; without any, everybody may ask.
        max_body_bytes: the most bytes of a request, but for uploads.
        max_images: the most images of a request.
        max_image_bytes: the most bytes of a request's images together.
        max_image_pixels: the most pixels of a request's images together.
        max_upload_bytes: the most bytes of an upload of an adapter.
        max_spool_bytes: the most bytes of all uploads that are being received; a tenant's have at most half.
        max_connections: the most connections; a tenant has requests on at most half.
        header_timeout: seconds that a connection may be open without a whole request, first or next.
        body_timeout: seconds in which a body must come, besides those that its bytes take at 64 KiB a second.
        max_new_tokens: the most tokens of an answer, and the number for a chat that names none.
        deadline: seconds after which a request ends, those of waiting included; None: never.
        grace: seconds for which ``lorac serve`` goes on with requests at work when it is to stop.
        pinned: adapters that stay in memory and cannot be unloaded.
        sources: places from which ``/v1/load_lora_adapter`` takes adapters by name, as ``hf:user/*`` or
            ``s3://bucket/*``; by default none.
        predict: whether ``/v1/predict`` gives the model's outputs; None: unless the model continues text.
        max_output_bytes: the most bytes of outputs that ``/v1/predict`` gives.
        page: whether ``/`` is a page to chat on.
        memory: the most bytes of adapters and caches (``compiled.memory.limit``); None: as many as they take.
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
        bytes: the most of all files together, with those being uploaded; equal files count once.
        adapters: the most names.
        rank: the largest rank of an adapter.
        sites: the most sites of an adapter.
        uploads_per_minute: the most uploads, with refused ones.
        seconds: the most processor time of reading an upload.
        memory: the most bytes that reading an upload takes.
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
            AdapterError: it has more sites, or a larger rank, than an adapter may.
        """
        rank = size.rank > self.rank
        if rank or size.sites > self.sites:
            what, most = (f"rank {size.rank}", self.rank) if rank else (f"{size.sites} sites", self.sites)
            step = f"the most that this server admits is {most}"
            raise AdapterError(f"adapter '{name}' has {what}", next_step=step, code="over_quota")
