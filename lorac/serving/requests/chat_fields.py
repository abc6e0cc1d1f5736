"""The fields of a chat request, and the conversation that a chat template takes."""

import json
from typing import Annotated, Literal

import pydantic

from lorac.argument_types import JsonMapping
from lorac.serving.refusals import RefusedField
from lorac.serving.requests.request_body import Items
from lorac.serving.requests.sampling_fields import Amount, SamplingFields

MOST_MESSAGES = 4096
"""The most turns of a conversation."""


class TextPart(pydantic.BaseModel, extra="forbid", strict=True):
    """A part of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(pydantic.BaseModel, extra="forbid", strict=True):
    """A function that the model called.

    Attributes:
        arguments: JSON.
    """

    name: str
    arguments: str = "{}"


class ToolCallFields(pydantic.BaseModel, extra="forbid", strict=True):
    """A call in an earlier turn."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(pydantic.BaseModel, extra="forbid", strict=True):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Items[TextPart] = ""
    name: str = ""
    reasoning_content: str = ""
    tool_calls: Items[ToolCallFields] = []
    tool_call_id: str = ""

    @pydantic.model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, fields: object) -> object:
        """Leave out fields that are null, as clients send back an answer's message."""
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields

    def for_template(self) -> dict[str, object]:
        """Return the turn as chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        more = {"name": self.name, "reasoning_content": self.reasoning_content, "tool_call_id": self.tool_call_id}
        calls = [_call_for_template(call) for call in self.tool_calls]
        given = {**more, "tool_calls": calls}
        return {"role": role, "content": text, **{name: value for name, value in given.items() if value}}


def _call_for_template(call: ToolCallFields) -> dict[str, object]:
    """Return a call with its arguments as an object, which templates write in the model's own form."""
    try:
        arguments = json.loads(call.function.arguments)
    except ValueError as error:
        raise RefusedField(
            "messages", f"holds a call of '{call.function.name}' whose arguments are not JSON"
        ) from error
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}


class ToolFunction(pydantic.BaseModel, extra="forbid", strict=True):
    """A function that the model may call."""

    name: Annotated[str, pydantic.Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str = ""
    parameters: JsonMapping = {}


class Tool(pydantic.BaseModel, extra="forbid", strict=True):
    """A tool that the model may use."""

    type: Literal["function"]
    function: ToolFunction


class JsonSchema(pydantic.BaseModel, extra="forbid", strict=True):
    """A schema that an answer must satisfy; it always does, strict or not."""

    name: str
    schema_: JsonMapping = pydantic.Field(alias="schema")
    description: str = ""
    strict: bool = True


class ResponseFormat(pydantic.BaseModel, extra="forbid", strict=True):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatFields(SamplingFields):
    """The fields of a chat request.

    Attributes:
        tools: the answer may call them, where the model's tokenizer says how calls look.
    """

    messages: Annotated[Items[ChatMessage], pydantic.Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Amount | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, pydantic.Field(ge=0, le=20)] | None = None
    tools: Annotated[Items[Tool], pydantic.Field(max_length=128)] = pydantic.Field(default_factory=list)
    tool_choice: Literal["auto", "none"] = "auto"
    response_format: ResponseFormat = ResponseFormat(type="text")

    @property
    def logprob_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def offered_tools(self) -> list[dict[str, object]]:
        """The tools that the answer may call, as chat templates take them."""
        return [tool.model_dump() for tool in self.tools] if self.tool_choice != "none" else []

    @property
    def turns(self) -> list[dict[str, object]]:
        """The conversation, as chat templates take it."""
        return [message.for_template() for message in self.messages]

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise RefusedField("top_logprobs", "needs log-probabilities", next_step="give 'logprobs': true")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise RefusedField("max_tokens", "contradicts 'max_completion_tokens'", next_step="leave one of them out")
        if (self.response_format.type == "json_schema") != (self.response_format.json_schema is not None):
            raise RefusedField("response_format", "has a 'json_schema' if, and only if, that is its type")
        if self.offered_tools and self.response_format.type != "text":
            raise RefusedField(
                "response_format", "leaves no room for calls of 'tools'", next_step="leave one of them out"
            )
