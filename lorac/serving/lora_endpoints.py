"""The endpoints that load and unload adapters, as vLLM has them."""

from typing import Annotated

import fastapi
import pydantic
from fastapi.responses import PlainTextResponse

from lorac.serving.refusals import NotAllowed

AdapterName = Annotated[str, pydantic.Field(min_length=1, max_length=256)]
router = fastapi.APIRouter()


class LoadFields(pydantic.BaseModel, extra="forbid", strict=True):
    """An adapter to be loaded.

    Attributes:
        lora_name: the tenant's name for it.
        lora_path: where it lies in the store.
    """

    lora_name: AdapterName
    lora_path: AdapterName


class UnloadFields(pydantic.BaseModel, extra="forbid", strict=True):
    """An adapter to be unloaded.

    Attributes:
        lora_name: the tenant's name for it.
        lora_int_id: vLLM's number for it, which says nothing here.
    """

    lora_name: AdapterName
    lora_int_id: int | None = None


@router.post("/v1/load_lora_adapter")
def load_adapter(fields: LoadFields, http: fastapi.Request) -> PlainTextResponse:
    """Load an adapter from the store."""
    with http.app.state.metrics.time_load("path"):
        http.app.state.source.load(http.state.tenant, fields.lora_name, fields.lora_path)
    return PlainTextResponse(f"Success: LoRA adapter '{fields.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
def unload_adapter(fields: UnloadFields, http: fastapi.Request) -> PlainTextResponse:
    """Unload an adapter; requests at work keep it to their end."""
    if fields.lora_name in http.app.state.settings.pinned:
        raise NotAllowed(f"'{fields.lora_name}' is pinned", next_step="start the server without pinning it")
    http.app.state.source.unload(http.state.tenant, fields.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{fields.lora_name}' removed successfully.")
