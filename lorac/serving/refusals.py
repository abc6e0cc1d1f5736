"""Refusals in the form of OpenAI's errors."""

import json
import re
from collections.abc import Mapping, Sequence

import fastapi
import pydantic
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lorac.argument_types import JsonMapping
from lorac.errors import AdapterNotFound, FormatError, LoracError, OverBudget, escape_controls, nearest_name
from lorac.serving.requests.request_body import USUAL

_STATUS = {
    "adapter_exists": 409,
    "adapter_not_found": 404,
    "over_budget": 503,
    "quota_full": 403,
    "queue_full": 429,
    "stopping": 503,
    "too_many_uploads": 429,
}
"""Code of an error -> the status of its answer; 400 for all others."""
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}
"""Status -> OpenAI's name for such errors."""
_OPTIONAL_PATHS = {
    "/v1/predict": "--predict",
    "/v1/adapters": "--store FOLDER",
    "/v1/load_lora_adapter": "--store FOLDER",
    "/v1/unload_lora_adapter": "--store FOLDER",
}
"""Path -> the option of `lorac serve` that it needs."""
_LONGEST = 100
"""The most characters of a part of a field's name in a message."""
RETRY_AFTER = "1"
"""Seconds after which a client should ask again."""

_UNION = re.compile(r"str|int|float|NamedTool|ActiveFields|\w+Part|\S+[\[(].*")
"""Names of types; pydantic appends one to the location of an error in a field of several types."""


class RefusedRequest(LoracError):
    """A request is refused by the server, not by the model.

    Attributes:
        status: the HTTP status of the answer.
    """

    status = 400


class NotAllowed(RefusedRequest):
    """The request is not allowed, on this server or for this tenant."""

    status = 403


class DeadlinePassed(RefusedRequest):
    """The request took longer than the server's deadline."""

    status = 504


class RefusedField(RefusedRequest):
    """A field of a request is refused.

    Args:
        field: the field's name.
        fault: the rest of a sentence that begins with the field's name.
        next_step: a remedy.
    """

    def __init__(self, field: str, fault: str, *, next_step: str | None = None) -> None:
        super().__init__(f"'{field}' {fault}", next_step=next_step)
        self.field = field


def refusal(
    status: int,
    message: str,
    *,
    code: str | None = None,
    field: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Return an error as the answer to a request.

    Args:
        message: one or two sentences.
        code: the error's code.
        field: the field of the request that caused it.
    """
    kind = _KINDS.get(status, "invalid_request_error")
    error = {"message": escape_controls(message), "type": kind, "param": field, "code": code}
    retry = {"retry-after": RETRY_AFTER} if status in (429, 503) else {}
    return JSONResponse({"error": error}, status, {**retry, **(headers or {})})


def refuse(error: LoracError) -> JSONResponse:
    """Return an error of lorac's as the answer to a request."""
    parts = (error.what, error.nearest and f"nearest: {error.nearest}", error.next_step)
    field = error.field if isinstance(error, RefusedField) else "model" if isinstance(error, AdapterNotFound) else None
    return refusal(error_status(error), "; ".join(filter(None, parts)), code=error.code, field=field)


def error_status(error: LoracError) -> int:
    """Return the status of the answer to a request that raises an error."""
    if isinstance(error, RefusedRequest):
        return error.status
    # A retry helps neither a file that takes too much to read nor a request that is larger than the memory.
    is_final = isinstance(error, FormatError) or (isinstance(error, OverBudget) and error.permanent)
    return 400 if is_final else _STATUS.get(error.code, 400)


def _describe(problem: JsonMapping, field: str, known: Sequence[str]) -> str:
    if problem["type"] == "extra_forbidden":
        if values := USUAL.get(field):
            return f"'{field}' can only be {json.dumps(values[0])} on this server; leave it out"
        nearest = nearest_name(field, known, alike=0.7)
        near = f"; nearest: '{nearest}'" if nearest else "; leave it out"
        return f"'{field}' is not a field that this server knows{near}"
    if problem["type"] == "json_invalid":
        return f"the body is not JSON: {problem['ctx']['error']}"
    if problem["type"] == "missing":
        return f"'{field}' is missing" if field else "the request has no body; send JSON as application/json"
    if not field:
        return "the body is not a JSON object"
    return f"'{field}' is wrong: {problem['msg']}"


def install_handlers(app: fastapi.FastAPI, form: type[pydantic.BaseModel]) -> None:
    """Make an app answer errors in OpenAI's form.

    Args:
        form: the fields of form requests; for JSON, ``read_body`` puts the fields' class into the error's ``body``.
    """

    async def answer_error(request: fastapi.Request, error: Exception) -> JSONResponse:
        assert isinstance(error, LoracError)
        return refuse(error)

    async def answer_validation(request: fastapi.Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        model = error.body if isinstance(error.body, type) and issubclass(error.body, pydantic.BaseModel) else form
        known, first = tuple(model.model_fields), error.errors()[0]
        parts = [part for part in first["loc"][1:] if not _UNION.fullmatch(str(part))]
        path = (f"[{part}]" if isinstance(part, int) else f".{part[:_LONGEST]}" for part in parts)
        field = "".join(path).removeprefix(".")  # such as messages[0].role
        return refusal(400, _describe(first, field, known), code=first["type"], field=field or None)

    async def answer_status(request: fastapi.Request, error: Exception) -> JSONResponse:
        status = getattr(error, "status_code", 500)
        message = str(getattr(error, "detail", "the request is not HTTP"))
        if status == 404:
            found = (option for start, option in _OPTIONAL_PATHS.items() if request.url.path.startswith(start))
            step = next((f"start the server with {option}" for option in found), "docs/serving.md lists the paths")
            message = f"there is no such path; {step}"
        elif status == 405:
            message = "the path has no such method"
        return refusal(status, message, headers=getattr(error, "headers", None))

    async def answer_fault(request: fastapi.Request, error: Exception) -> JSONResponse:
        return refusal(500, "the server failed; its log says why")

    app.add_exception_handler(LoracError, answer_error)
    app.add_exception_handler(RequestValidationError, answer_validation)
    app.add_exception_handler(HTTPException, answer_status)
    app.add_exception_handler(Exception, answer_fault)
