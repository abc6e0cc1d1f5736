"""Endpoints for adapters: load and unload, as in vLLM; upload, list and remove, with a store."""

from typing import Annotated, TypeAlias

import fastapi
import pydantic
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse

from lorac.serving.answers.connection import JsonAnswer
from lorac.serving.guard import UPLOADS
from lorac.serving.refusals import NotAllowed, RefusedField
from lorac.serving.requests.request_body import drop_usual, read_body
from lorac.serving.store import AdapterStore, TenantAdapter
from lorac.storage.remote import parse_name

AdapterName = Annotated[str, pydantic.Field(min_length=1, max_length=256)]
router = fastapi.APIRouter()


class LoadFields(pydantic.BaseModel, extra="forbid", strict=True):
    """Fields of a request to load an adapter.

    Attributes:
        lora_name: the tenant's name for the adapter.
        lora_path: a path below the tenant's folder in the store's ``incoming``, or a name such as ``hf:user/repo``.
    """

    lora_name: AdapterName
    lora_path: AdapterName
    drop_usual = pydantic.model_validator(mode="before")(drop_usual)


class UnloadFields(pydantic.BaseModel, extra="forbid", strict=True):
    """Fields of a request to unload an adapter.

    Attributes:
        lora_name: the tenant's name for the adapter.
        lora_int_id: vLLM's number of the adapter; ignored.
    """

    lora_name: AdapterName
    lora_int_id: int | None = None
    drop_usual = pydantic.model_validator(mode="before")(drop_usual)


LoadBody: TypeAlias = Annotated[LoadFields, read_body(LoadFields)]
UnloadBody: TypeAlias = Annotated[UnloadFields, read_body(UnloadFields)]


@router.post("/v1/load_lora_adapter")
async def load_adapter(fields: LoadBody, http: fastapi.Request) -> PlainTextResponse:
    """Load an adapter into the store, from a path or a name."""
    state, tenant = http.app.state, http.state.tenant

    def load() -> None:
        with state.metrics.time_load("path"):
            state.source.load(tenant, fields.lora_name, fields.lora_path)

    turns = state.readers if parse_name(fields.lora_path) is None else state.downloads
    await turns.run(tenant, load)
    return PlainTextResponse(f"Success: LoRA adapter '{fields.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
def unload_adapter(fields: UnloadBody, http: fastapi.Request) -> PlainTextResponse:
    """Unload an adapter; running requests keep it until they end."""
    if fields.lora_name in http.app.state.settings.pinned:
        raise NotAllowed(f"'{fields.lora_name}' is pinned", next_step="start the server without pinning it")
    http.app.state.source.unload(http.state.tenant, fields.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{fields.lora_name}' removed successfully.")


class UploadFields(pydantic.BaseModel, extra="forbid"):
    """The fields of an upload, as multipart/form-data."""

    name: str
    files: list[fastapi.UploadFile]
    base: str | None = None


def add_store_endpoints(app: fastapi.FastAPI, store: AdapterStore) -> None:
    """Add the endpoints by which tenants upload, list and remove adapters.

    Args:
        app: the app; ``state.tenant`` of a request is its tenant.
        store: keeps the adapters.
    """

    @app.post(UPLOADS)
    async def upload(fields: Annotated[UploadFields, fastapi.Form()], http: fastapi.Request) -> JSONResponse:
        files = {file.filename or "": file.file for file in fields.files}
        if len(files) < len(fields.files):
            raise RefusedField("files", "has two files of one name")

        def add() -> TenantAdapter:
            with app.state.metrics.time_load("upload"):
                return store.upload(http.state.tenant, fields.name, files, base=fields.base)

        return JSONResponse(_describe(await app.state.readers.run(http.state.tenant, add)), 201)

    @app.get(UPLOADS)
    def adapters(http: fastapi.Request) -> JSONResponse:
        return JsonAnswer({"object": "list", "data": [_describe(one) for one in store.adapters(http.state.tenant)]})

    @app.delete(f"{UPLOADS}/{{name}}")
    async def unload(name: str, http: fastapi.Request) -> dict[str, object]:
        await run_in_threadpool(store.unload, http.state.tenant, name)
        return {"id": name, "object": "adapter", "deleted": True}


def _describe(adapter: TenantAdapter) -> dict[str, object]:
    own = {"digest": adapter.digest, "bytes": adapter.nbytes} if adapter.digest else {}
    return {"id": adapter.name, "object": "adapter", "shared": not own, **own}
