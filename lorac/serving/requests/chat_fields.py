"""The fields of a chat request, and the conversation that a chat template takes."""

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import pydantic

from lorac.argument_types import JsonMapping
from lorac.serving.refusals import RefusedField
from lorac.serving.requests.request_body import Items, drop_usual
from lorac.serving.requests.sampling_fields import Amount, SamplingFields

MOST_MESSAGES = 4096
"""The most turns of a conversation."""
ANY: JsonMapping = {"type": "object"}
"""The schema of any JSON object."""


class TextPart(pydantic.BaseModel, extra="forbid", strict=True):
    """Text in a message."""

    type: Literal["text"]
    text: str


class ImageAddress(pydantic.BaseModel, extra="forbid", strict=True):
    """The address of an image.

    Attributes:
        url: a data URL.
        detail: the resolution; only "auto", since the model's processor decides.
    """

    url: str
    detail: Literal["auto"] = "auto"


class ImagePart(pydantic.BaseModel, extra="forbid", strict=True):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageAddress


def _name_part(part: object) -> str:
    is_image = (isinstance(part, dict) and part.get("type") == "image_url") or isinstance(part, ImagePart)
    return (ImagePart if is_image else TextPart).__name__


MessagePart = Annotated[
    Annotated[TextPart, pydantic.Tag(TextPart.__name__)] | Annotated[ImagePart, pydantic.Tag(ImagePart.__name__)],
    pydantic.Discriminator(_name_part),
]


class CalledFunction(pydantic.BaseModel, extra="forbid", strict=True):
    """A function that the model called.

    Attributes:
        arguments: the arguments as JSON text.
    """

    name: str
    arguments: str = "{}"


class ToolCallFields(pydantic.BaseModel, extra="forbid", strict=True):
    """A tool call in an earlier turn."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(pydantic.BaseModel, extra="forbid", strict=True):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Items[MessagePart] = ""
    name: str = ""
    reasoning_content: str = ""
    tool_calls: Items[ToolCallFields] = []
    tool_call_id: str = ""
    drop_usual = pydantic.model_validator(mode="before")(drop_usual)

    @property
    def parts(self) -> Sequence[TextPart | ImagePart]:
        """The content as a list of parts."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content

    def for_template(self, images: Iterator[object] | None = None) -> dict[str, object]:
        """Return the turn as chat templates take it.

        Args:
            images: the images of the conversation from this turn on, from which the turn takes its own; None: the
                template is for text alone.

        Raises:
            RefusedField: the turn has images, and the template is for text alone.
        """
        texts = [part.text for part in self.parts if isinstance(part, TextPart)]
        content: object = "".join(texts)
        if images is not None:
            dumped = (part.model_dump() if isinstance(part, TextPart) else {"type": "image"} for part in self.parts)
            content = [part if part["type"] == "text" else {**part, "image": next(images)} for part in dumped]
        elif len(texts) < len(self.parts):
            step = "serve a model that reads images, saved with its processor: compiled.save(folder, tokenizer=...)"
            raise RefusedField("messages", "holds an image, and this server reads text alone", next_step=step)
        role = "system" if self.role == "developer" else self.role
        more = {"name": self.name, "reasoning_content": self.reasoning_content, "tool_call_id": self.tool_call_id}
        calls = []
        for call in self.tool_calls:  # templates write arguments, as an object, in the model's own form
            name = call.function.name
            try:
                arguments = json.loads(call.function.arguments)
            except ValueError as error:
                raise RefusedField("messages", f"holds a call of '{name}' whose arguments are not JSON") from error
            calls.append({"id": call.id, "type": call.type, "function": {"name": name, "arguments": arguments}})
        given = {**more, "tool_calls": calls}
        return {"role": role, "content": content, **{name: value for name, value in given.items() if value}}


class ToolFunction(pydantic.BaseModel, extra="forbid", strict=True):
    """A function that the model may call.

    Attributes:
        strict: accepted and ignored: the arguments of a forced call always fit the schema.
    """

    name: Annotated[str, pydantic.Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str = ""
    parameters: JsonMapping = pydantic.Field(default_factory=dict)
    strict: bool = False


class Tool(pydantic.BaseModel, extra="forbid", strict=True):
    """A tool that the model may use."""

    type: Literal["function"]
    function: ToolFunction


class ToolName(pydantic.BaseModel, extra="forbid", strict=True):
    """The name of a function."""

    name: str


class NamedTool(pydantic.BaseModel, extra="forbid", strict=True):
    """The tool that the answer must call."""

    type: Literal["function"]
    function: ToolName


class JsonSchema(pydantic.BaseModel, extra="forbid", strict=True):
    """A schema that every answer satisfies, whether ``strict`` is set or not."""

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
        tools: tools that the answer may call; needs a tokenizer with a response template, or a forced call.
        tool_choice: with "required" or a tool, the answer is one call, in JSON that fits the schema of its arguments.
    """

    messages: Annotated[Items[ChatMessage], pydantic.Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Amount | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, pydantic.Field(ge=0, le=20)] | None = None
    tools: Annotated[Items[Tool], pydantic.Field(max_length=128)] = pydantic.Field(default_factory=list)
    tool_choice: Literal["auto", "none", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
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
        dumped = [tool.model_dump(exclude={"function": {"strict"}}) for tool in self.tools]
        return dumped if self.tool_choice != "none" else []

    @property
    def forced_tools(self) -> list[ToolFunction]:
        """The tools of which the answer must call one; empty: it may be any text."""
        functions = [tool.function for tool in self.tools]
        if isinstance(self.tool_choice, str):
            return functions if self.tool_choice == "required" else []
        return [function for function in functions if function.name == self.tool_choice.function.name]

    @property
    def answer_schema(self) -> tuple[str, JsonMapping] | None:
        if self.forced_tools:
            calls, own = [], {}
            for function in self.forced_tools:  # a ``$ref`` in their own schemas is rewritten to fit
                text = json.dumps(function.parameters or ANY)
                own[function.name] = json.loads(text.replace('"$ref": "#', f'"$ref": "#/$defs/{function.name}'))
                fields = {"name": {"const": function.name}, "arguments": {"$ref": f"#/$defs/{function.name}"}}
                required = {"required": [*fields], "additionalProperties": False}
                calls.append({"type": "object", "properties": fields, **required})
            return "tools", {"anyOf": calls, "$defs": own, "x-guidance": {"whitespace_flexible": False}}
        schema = self.response_format.json_schema
        return None if self.response_format.type == "text" else ("response_format", schema.schema_ if schema else ANY)

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise RefusedField("top_logprobs", "needs log-probabilities", next_step="give 'logprobs': true")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise RefusedField("max_tokens", "contradicts 'max_completion_tokens'", next_step="leave one of them out")
        if (self.response_format.type == "json_schema") != (self.response_format.json_schema is not None):
            raise RefusedField(
                "response_format", "needs a 'json_schema' for the type 'json_schema', and takes none for others"
            )
        if self.tool_choice not in ("auto", "none") and not self.forced_tools:
            raise RefusedField("tool_choice", "names a tool that is not in 'tools'")
        if self.offered_tools and not (self.parallel_tool_calls or self.forced_tools):
            raise RefusedField(
                "parallel_tool_calls", "cannot be false", next_step="force one call: 'tool_choice': \"required\""
            )
        if self.offered_tools and self.response_format.type != "text":
            raise RefusedField("response_format", "cannot be given with 'tools'", next_step="leave one of them out")


class TokenizeFields(pydantic.BaseModel, extra="forbid", strict=True):
    """The fields of a request for the tokens of a prompt or of a conversation, as in vLLM.

    Attributes:
        model: ignored: all adapters have the base's tokenizer.
    """

    model: str = ""
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], pydantic.Field(min_length=1)] | None = None
    drop_usual = pydantic.model_validator(mode="before")(drop_usual)
