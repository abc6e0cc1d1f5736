"""The endpoints that generate text, and the endpoint that returns tokens."""

import contextlib
import functools
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Annotated, TypeAlias, TypeVar

import fastapi
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from lorac.errors import LoracError
from lorac.serving.answers.answers import AnswerPart
from lorac.serving.answers.connection import CLIENT_LEFT, EventStream, JsonAnswer, format_event, run_while_connected
from lorac.serving.answers.openai_shapes import AnswerShape, ChatShape, CompletionShape
from lorac.serving.refusals import refuse
from lorac.serving.requests.chat_fields import ChatFields, ChatMessage, TokenizeFields
from lorac.serving.requests.request_body import read_body
from lorac.serving.requests.sampling_fields import CompletionFields, SamplingFields
from lorac.serving.text_service import SubmittedText

FieldsT = TypeVar("FieldsT", bound=SamplingFields)
_FEW = 4
"""The most tokens of a part that is formatted in the event loop."""
ChatBody: TypeAlias = Annotated[ChatFields, read_body(ChatFields)]
CompletionBody: TypeAlias = Annotated[CompletionFields, read_body(CompletionFields)]
TokenizeBody: TypeAlias = Annotated[TokenizeFields, read_body(TokenizeFields)]
router = fastapi.APIRouter()


@router.post("/v1/chat/completions")
async def chat(fields: ChatBody, http: fastapi.Request) -> Response:
    """Answer a conversation."""
    begin = functools.partial(http.app.state.text.begin_chat, images=await _read_images(http, fields.messages))
    return await _answer(http, begin, fields, ChatShape)


@router.post("/v1/completions")
async def complete(fields: CompletionBody, http: fastapi.Request) -> Response:
    """Continue prompts."""
    return await _answer(http, http.app.state.text.begin_completion, fields, CompletionShape)


@router.post("/tokenize")
async def tokenize(fields: TokenizeBody, http: fastapi.Request) -> Response:
    """Return the tokens of a prompt or of a conversation."""
    state, images = http.app.state, await _read_images(http, fields.messages or ())
    return await state.turns.run(http.state.tenant, lambda: JsonAnswer(state.text.tokenize(fields, images)))


async def _read_images(http: fastapi.Request, messages: Sequence[ChatMessage]) -> Sequence[object] | None:
    """Return the images of a conversation; None where the server reads text alone."""
    state = http.app.state
    if state.images is None:
        return None
    return await state.image_turns.run(http.state.tenant, lambda: state.images.read(messages))


async def _answer(
    http: fastapi.Request,
    begin: Callable[[FieldsT, str], SubmittedText],
    fields: FieldsT,
    shape_class: type[AnswerShape],
) -> Response:
    state, tenant = http.app.state, http.state.tenant
    request, parts = await state.turns.run(tenant, lambda: begin(fields, tenant))
    http.state.text = request
    shape = shape_class(request, state.compiled.tokenizer, has_logprobs=fields.logprob_count is not None)
    if not fields.stream:
        found = await run_while_connected(_collect(parts), http.receive)
        if found is None:
            return Response(status_code=CLIENT_LEFT)
        return await state.turns.run(tenant, lambda: JsonAnswer(shape.whole(found)))
    # An error before the first token still sets the response's status.
    first = await run_while_connected(anext(parts), http.receive)
    if first is None:
        await parts.aclose()
        return Response(status_code=CLIENT_LEFT)
    opening = [*(format_event(json.dumps(one)) for one in shape.opening()), await _write_chunk(shape, first)]
    return EventStream(_events(shape, opening, parts, reports_usage=fields.reports_usage))


async def _write_chunk(shape: AnswerShape, part: AnswerPart) -> str:
    """Return a part as an event, formatted in a thread if it has many tokens with log-probabilities."""

    def write() -> str:
        return format_event(json.dumps(shape.chunk(part)))

    return await run_in_threadpool(write) if len(part.tokens) > _FEW else write()


async def _collect(parts: AsyncGenerator[AnswerPart]) -> list[AnswerPart]:
    async with contextlib.aclosing(parts):
        return [part async for part in parts]


async def _events(
    shape: AnswerShape, opening: Sequence[str], parts: AsyncGenerator[AnswerPart], *, reports_usage: bool
) -> AsyncGenerator[str]:
    """Yield the events of a stream; its status has been sent, so an error becomes an event.

    Args:
        opening: the first events.
        parts: the parts after the first.
    """
    try:
        for chunk in opening:
            yield chunk
        async for part in parts:
            yield await _write_chunk(shape, part)
        if reports_usage:
            yield format_event(json.dumps(shape.usage()))
        yield format_event("[DONE]")
    except LoracError as error:
        yield format_event(bytes(refuse(error).body).decode())
    finally:
        await parts.aclose()
