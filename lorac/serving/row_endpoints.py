"""The endpoints that call a model once: embeddings, classes and predictions."""

import base64
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeAlias, final

import fastapi
import pydantic
import torch
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from starlette.datastructures import State
from torch import Tensor
from torch.nn import functional

from lorac.errors import Unavailable
from lorac.frontend.components import MAIN_GRAPH
from lorac.ir.slots.choice import ChoiceSpec, parse_choice
from lorac.serving.answers.connection import JsonAnswer
from lorac.serving.arrays import read_lists, read_npz, write_lists, write_npz
from lorac.serving.refusals import RefusedField
from lorac.serving.requests.choices import read_choices
from lorac.serving.requests.request_body import Items, Name, parse_fields, read_body
from lorac.serving.requests.sampling_fields import MOST_ROWS, Choices, Ids, ModelName, UserName, list_texts
from lorac.serving.row_batches import Outputs
from lorac.serving.served_model import ServedModel
from lorac.serving.tokenizer import FastTokenizer
from lorac.session.compiled import Compiled
from lorac.storage.strict_json import JsonObject

NPZ = ("application/x-npz", "application/octet-stream")
"""Media types of NumPy's files."""
text_router, predict_router = fastapi.APIRouter(), fastapi.APIRouter()
MOST_PREDICTED = 4096
"""The most rows of a request for outputs."""
MOST_TOKENS = 1 << 18
"""The most tokens of a request for embeddings or classes, padding included."""


class _TextFields(pydantic.BaseModel, ABC, extra="forbid", strict=True):
    """The fields that requests for embeddings and for classes share.

    Attributes:
        model: an adapter, a mixture, or the base.
        input: one text or several, as text or token ids.
        adapters: where ``model`` is the base: a choice of adapters, or a list with one per text.
        user: ignored.
    """

    model: ModelName
    input: str | Ids | Annotated[Items[str] | Items[Ids], pydantic.Field(min_length=1, max_length=MOST_ROWS)]
    adapters: Choices = None
    user: UserName = ""

    @abstractmethod
    def write(self, outputs: Outputs, mask: Tensor, choices: Sequence[ChoiceSpec], state: State) -> JsonObject:
        """Return the response's fields for this kind of request.

        Args:
            outputs: the model's outputs, one row per text.
            mask: the attention mask of the texts (rows, length).
            choices: the choices of adapters, one per text.
            state: the app's state.
        """


@final
class EmbeddingFields(_TextFields):
    """The fields of a request for embeddings."""

    encoding_format: Literal["float", "base64"] = "float"

    def write(self, outputs: Outputs, mask: Tensor, choices: Sequence[ChoiceSpec], state: State) -> JsonObject:
        vectors = _pool(outputs, mask, state.settings.pooling)
        if self.encoding_format == "float":
            embeddings: list[object] = write_lists(vectors)
        else:
            embeddings = [base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode() for vector in vectors]
        return {"data": [{"object": "embedding", "index": i, "embedding": one} for i, one in enumerate(embeddings)]}


@final
class ClassifyFields(_TextFields):
    """The fields of a request for classes, as in vLLM.

    Attributes:
        use_activation: return probabilities; else logits.
    """

    use_activation: bool = True

    def write(self, outputs: Outputs, mask: Tensor, choices: Sequence[ChoiceSpec], state: State) -> JsonObject:
        classes = classify_rows(state.compiled, outputs, choices, probabilities=self.use_activation)
        return {"id": f"classify-{uuid.uuid4().hex}", "created": int(time.time()), "data": classes}


EmbeddingBody: TypeAlias = Annotated[EmbeddingFields, read_body(EmbeddingFields)]
ClassifyBody: TypeAlias = Annotated[ClassifyFields, read_body(ClassifyFields)]


class PredictFields(pydantic.BaseModel, extra="forbid", strict=True):
    """The fields of a request for a model's outputs.

    Attributes:
        model: an adapter, a mixture, or the base.
        inputs: name -> nested lists of numbers; the first axis is the rows.
        adapters: where ``model`` is the base: a choice of adapters, or a list with one per row.
    """

    model: ModelName
    inputs: Annotated[dict[Name, list[object]], pydantic.Field(min_length=1)]
    adapters: Choices = None


@text_router.post("/v1/embeddings")
async def embed(fields: EmbeddingBody, http: fastapi.Request) -> Response:
    """Return an embedding of unit norm for each text."""
    return await _answer(fields, http)


@text_router.post("/classify")
@text_router.post("/v1/classify")
async def classify(fields: ClassifyBody, http: fastapi.Request) -> Response:
    """Return the class of each text, and the probabilities of all classes that its adapter has."""
    return await _answer(fields, http)


async def _answer(fields: _TextFields, http: fastapi.Request) -> Response:
    """Compute a row for each text of a request, and return the response."""
    state, texts = http.app.state, list_texts(fields.input)
    most = getattr(state.compiled.traits[MAIN_GRAPH].config, "max_position_embeddings", None)

    def read() -> tuple[dict[str, Tensor], list[ChoiceSpec]]:
        choices = _read_choices(http, fields.model, fields.adapters, len(texts))
        return _encode(state.compiled.tokenizer, texts, most), choices

    inputs, choices = await run_in_threadpool(read)
    outputs = await state.rows.compute(inputs, choices, http.state.tenant)

    def respond() -> Response:
        mask = inputs["attention_mask"]
        usage = dict.fromkeys(("prompt_tokens", "total_tokens"), int(mask.sum()))
        own = fields.write(outputs, mask, choices, state)
        return JsonAnswer({"object": "list", "model": fields.model, "usage": usage, **own})

    return await run_in_threadpool(respond)


@predict_router.post("/v1/predict")
async def predict(http: fastapi.Request) -> Response:
    """Return a model's outputs for the rows of its inputs, in the inputs' form: JSON or npz."""
    state, media = http.app.state, http.headers.get("content-type", "").partition(";")[0].strip().lower()
    body, traits, most = await http.body(), state.compiled.traits[MAIN_GRAPH], state.settings.max_output_bytes

    def read() -> tuple[str, dict[str, Tensor], list[ChoiceSpec]]:
        adapters: Choices = None
        if media in NPZ:
            model = http.query_params.get("model", state.settings.base_name)
            inputs = read_npz(body, state.settings.max_body_bytes)
        else:
            fields = parse_fields(PredictFields, body)
            model, adapters, inputs = fields.model, fields.adapters, read_lists(fields.inputs, traits.dtype)
        rows = _count_rows(inputs)
        logits = getattr(traits.config, "vocab_size", 0) if traits.generation is not None else 0
        _check_size(max(value.numel() for value in inputs.values()) * logits * traits.dtype.itemsize, most)
        return model, inputs, _read_choices(http, model, adapters, rows)

    model, inputs, choices = await run_in_threadpool(read)
    outputs = await state.rows.compute(inputs, choices, http.state.tenant)

    def write() -> Response:
        _check_size(sum(value.nbytes for value in outputs.values()), most)
        if media in NPZ:
            return Response(write_npz(outputs), media_type=NPZ[0])
        return JsonAnswer({"model": model, "outputs": {name: write_lists(value) for name, value in outputs.items()}})

    return await run_in_threadpool(write)


def _check_size(nbytes: int, most: int) -> None:
    if nbytes > most:
        raise RefusedField("inputs", f"give {nbytes} bytes of outputs, and this server gives {most} at most")


def _read_choices(http: fastapi.Request, model: str, adapters: Choices, rows: int) -> list[ChoiceSpec]:
    state = http.app.state
    return read_choices(state.source, http.state.tenant, state.settings.base_name, model, adapters, rows)


def _count_rows(inputs: Mapping[str, Tensor]) -> int:
    """Return the number of rows, which all inputs share."""
    counts = {name: len(value) if value.dim() else 0 for name, value in inputs.items()}
    if len({*counts.values()}) != 1 or 0 in counts.values():
        listed = ", ".join(f"{name}: {count}" for name, count in counts.items()) or "none"
        raise RefusedField("inputs", f"have no number of rows in common: {listed}")
    rows = next(iter(counts.values()))
    if rows > MOST_PREDICTED:
        raise RefusedField("inputs", f"have {rows} rows, and a request has {MOST_PREDICTED} at most")
    return rows


def _encode(tokenizer: FastTokenizer, texts: Sequence[str | list[int]], most: int | None) -> dict[str, Tensor]:
    """Return the token ids of texts and their mask (rows, length), padded on the right."""
    rows = [text if isinstance(text, list) else tokenizer(text)["input_ids"] for text in texts]
    for index, row in enumerate(rows):
        if not row or (most is not None and len(row) > most):
            raise RefusedField("input", f"has {len(row)} tokens in text {index}, and the model reads 1 to {most}")
    longest = max(map(len, rows))
    if len(rows) * longest > MOST_TOKENS:
        raise RefusedField(
            "input", f"has {len(rows)} texts of up to {longest} tokens, and room for {MOST_TOKENS} in all"
        )
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def _pool(outputs: Outputs, mask: Tensor, pooling: str) -> Tensor:
    """Pool the last hidden states (rows, length, width) into vectors of unit norm (rows, width)."""
    if "last_hidden_state" not in outputs:
        raise Unavailable(
            f"the model has no last_hidden_state, but {', '.join(outputs)}",
            next_step="compile the encoder itself, as transformers.AutoModel loads it",
        )
    states = outputs["last_hidden_state"].float()
    weights = mask[..., None].float()
    pooled = states[:, 0] if pooling == "cls" else (states * weights).sum(1) / weights.sum(1)
    return functional.normalize(pooled, dim=-1)


def classify_rows(
    compiled: ServedModel, outputs: Mapping[str, Tensor], choices: Sequence[ChoiceSpec], *, probabilities: bool
) -> list[object]:
    """Return each row's index, label, probabilities and number of classes, in vLLM's form.

    Args:
        outputs: the model's outputs, with logits (rows, classes), padded with −inf beyond the classes of a row.
        choices: the choices of adapters, one per row.
        probabilities: return probabilities; else logits.

    Raises:
        Unavailable: the model does not classify sequences.
    """
    config, logits = compiled.traits[MAIN_GRAPH].config, outputs.get("logits")
    if logits is None or logits.dim() != 2:
        raise Unavailable(
            f"the model gives no class for each text, but {', '.join(outputs)}",
            next_step="serve a model for sequence classification; /v1/predict gives any model's outputs",
        )
    found, named = list[object](), getattr(config, "id2label", None) or {}
    for index, (row, choice) in enumerate(zip(logits.float(), choices, strict=True)):
        own = row[row > -math.inf]
        known: list[Sequence[str]] = [[str(named[key]) for key in sorted(named, key=int)]]
        if isinstance(compiled, Compiled):
            known[:0] = [compiled.pool[name].labels for name, _ in parse_choice(choice, compiled.pool)]
        best, usual = int(own.argmax()), [f"LABEL_{place}" for place in range(len(own))]
        labels = next((labels for labels in known if len(labels) == len(own)), usual)
        independent = len(own) == 1 or getattr(config, "problem_type", None) == "multi_label_classification"
        values = own if not probabilities else own.sigmoid() if independent else own.softmax(0)
        found.append({"index": index, "label": labels[best], "probs": values.tolist(), "num_classes": len(own)})
    return found
