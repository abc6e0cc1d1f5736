"""The endpoints by which tenants bring adapters, list and remove them."""

from typing import Annotated

import anyio
import anyio.to_thread
import fastapi
import pydantic
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from lorac.serving.guard import UPLOADS
from lorac.serving.refusals import RefusedField
from lorac.serving.store import AdapterStore, TenantAdapter

_MOST_UPLOADS = 4
"""Uploads that are worked on at a time, so that they never take all threads of a server."""


class UploadFields(pydantic.BaseModel, extra="forbid"):
    """The fields of an upload, as multipart/form-data."""

    name: str
    files: list[fastapi.UploadFile]
    base: str | None = None


def add_store_endpoints(app: fastapi.FastAPI, store: AdapterStore) -> None:
    """Let tenants bring adapters by HTTP.

    Args:
        app: the state of its requests says which tenant asks.
        store: keeps the adapters.
    """
    limiter = anyio.CapacityLimiter(_MOST_UPLOADS)

    @app.post(UPLOADS)
    async def upload(fields: Annotated[UploadFields, fastapi.Form()], http: fastapi.Request) -> JSONResponse:
        files = {file.filename or "": file.file for file in fields.files}
        if len(files) < len(fields.files):
            raise RefusedField("files", "has two files of one name")

        def add() -> TenantAdapter:
            with app.state.metrics.time_load("upload"):
                return store.upload(http.state.tenant, fields.name, files, base=fields.base)

        return JSONResponse(_describe(await anyio.to_thread.run_sync(add, limiter=limiter)), 201)

    @app.get(UPLOADS)
    async def adapters(http: fastapi.Request) -> dict[str, object]:
        return {"object": "list", "data": [_describe(adapter) for adapter in store.adapters(http.state.tenant)]}

    @app.delete(f"{UPLOADS}/{{name}}")
    async def unload(name: str, http: fastapi.Request) -> dict[str, object]:
        await run_in_threadpool(store.unload, http.state.tenant, name)
        return {"id": name, "object": "adapter", "deleted": True}


def _describe(adapter: TenantAdapter) -> dict[str, object]:
    own = {"digest": adapter.digest, "bytes": adapter.nbytes} if adapter.digest else {}
    return {"id": adapter.name, "object": "adapter", "shared": not own, **own}
