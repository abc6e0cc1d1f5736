"""The JSON of a request, parsed in a thread so that parsing does not block the event loop; null fields are dropped."""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias, TypeVar

import fastapi
import pydantic
from fastapi.exceptions import RequestValidationError

USUAL: Mapping[str, Sequence[object] | None] = {
    "annotations": [[]],
    "best_of": [1],
    "continue_final_message": [False],
    "echo": [False],
    "ignore_eos": [False],
    "include_stop_str_in_output": [False],
    "length_penalty": [1],
    "load_inplace": [False],
    "metadata": None,
    "min_tokens": [0],
    "modalities": [["text"]],
    "parallel_tool_calls": [True],
    "prompt_cache_key": None,
    "safety_identifier": None,
    "service_tier": ["auto", "default"],
    "skip_special_tokens": [True],
    "stop_token_ids": [[]],
    "store": [False],
    "suffix": [""],
    "use_beam_search": [False],
}
"""Field of OpenAI's or vLLM's clients that the server lacks -> the values that it ignores; None: any value."""


def drop_usual(cls: type[pydantic.BaseModel], fields: object) -> object:
    """Drop fields that change nothing: null fields, and fields with a value of ``USUAL``.

    Use it as a validator that runs before the fields': ``pydantic.model_validator(mode="before")(drop_usual)``.
    """
    if not isinstance(fields, dict):
        return fields
    usual = {name: USUAL[name] for name in fields.keys() & USUAL.keys() - cls.model_fields.keys()}
    idle = {name for name, values in usual.items() if values is None or fields[name] in values}
    return {name: value for name, value in fields.items() if value is not None and name not in idle}


T = TypeVar("T")
FieldsT = TypeVar("FieldsT", bound=pydantic.BaseModel)
Items: TypeAlias = Annotated[list[T], pydantic.Field(fail_fast=True)]
"""A list that is validated up to its first fault, since describing all faults of a megabyte takes seconds."""
Name: TypeAlias = Annotated[str, pydantic.Field(max_length=256)]
MOST_KEYS = 1024
"""The most keys of an object."""


def read_body(fields: type[FieldsT]) -> Any:
    """Return FastAPI's dependency that reads a request's body into fields (``parse_fields``)."""

    async def read(http: fastapi.Request) -> FieldsT:
        media, body = http.headers.get("content-type", "").partition(";")[0].strip().lower(), await http.body()
        if not body or not (media == "application/json" or media.endswith("+json")):
            raise _wrong("missing", fields)
        parse = functools.partial(parse_fields, fields, body)
        return await http.app.state.turns.run(http.state.tenant, parse)

    return fastapi.Depends(read)


def parse_fields(fields: type[FieldsT], body: bytes) -> FieldsT:
    """Parse JSON into fields.

    Raises:
        RequestValidationError: the body is not JSON, has an object of too many keys, or fields that do not fit. The
            error's ``body`` is the class of the fields.
    """
    try:
        json.loads(body, object_pairs_hook=_check_keys)
        return fields.model_validate_json(body)
    except pydantic.ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        of_first = [one for one in errors if one["loc"][:1] == errors[0]["loc"][:1]]
        # A union reports errors of each of its types. The deepest that is no type error says what to change.
        worst = max(of_first, key=lambda one: (not one["type"].endswith("_type"), len(one["loc"])))
        raise RequestValidationError([{**worst, "loc": ("body", *worst["loc"])}], body=fields) from None
    except (ValueError, RecursionError) as error:
        raise _wrong("json_invalid", fields, str(error)) from None


def _check_keys(pairs: Sequence[tuple[str, object]]) -> None:
    if len(pairs) > MOST_KEYS:
        raise ValueError(f"an object has {len(pairs)} keys, and {MOST_KEYS} are the most")


def _wrong(kind: str, fields: type[pydantic.BaseModel], reason: str = "") -> RequestValidationError:
    return RequestValidationError([{"type": kind, "loc": ("body",), "ctx": {"error": reason}}], body=fields)
