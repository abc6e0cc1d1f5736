"""The fields of requests for embeddings and predictions."""

from typing import Annotated, Literal, TypeAlias

import pydantic

from lorac.serving.requests.completion_fields import Ids, list_texts
from lorac.serving.requests.sampling_fields import Strengths

MOST_ROWS = 256
"""The most rows of a request."""
Choices: TypeAlias = Strengths | list[Strengths | None] | None


class EmbeddingFields(pydantic.BaseModel, extra="forbid", strict=True):
    """The fields of a request for embeddings.

    Attributes:
        model: an adapter, a mixture, or the base.
        input: one text or several, as text or token ids.
        adapters: a choice of adapters for the base; or a list with one per text.
        user: is not used.
    """

    model: str
    input: str | Ids | Annotated[list[str] | list[Ids], pydantic.Field(min_length=1, max_length=MOST_ROWS)]
    encoding_format: Literal["float", "base64"] = "float"
    adapters: Choices = None
    user: str = ""

    @property
    def texts(self) -> list[str | list[int]]:
        """The texts, as text or token ids."""
        return list_texts(self.input)


class PredictFields(pydantic.BaseModel, extra="forbid", strict=True):
    """The fields of a request for a model's outputs.

    Attributes:
        model: an adapter, a mixture, or the base.
        inputs: name -> nested lists of numbers; the first axis is the rows.
        adapters: a choice of adapters for the base; or a list with one per row.
    """

    model: str
    inputs: Annotated[dict[str, list[object]], pydantic.Field(min_length=1)]
    adapters: Choices = None
