"""Fields of requests that change nothing: null fields, and fields that ask for the server's usual behaviour."""

from collections.abc import Mapping, Sequence

import pydantic

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
