"""A running request for text."""

import time
import uuid
from dataclasses import dataclass, field


@dataclass(eq=False)
class ActiveRequest:
    """A running request for text: its names, token counts and times.

    Attributes:
        tenant: the tenant that sent it.
        model: the adapters, as the request names them.
        adapters: the adapters' names in the compiled model.
        prompt_tokens: the number of tokens of all prompts.
        answers: the number of answers.
        user: the client's name for its user, from the request's field ``user``.
        completion_tokens: the number of tokens of all answers so far.
        reasons: the finish reasons of the answers that have ended.
        first_token: seconds until the first token; None before it.
    """

    tenant: str
    model: str
    adapters: tuple[str, ...]
    prompt_tokens: int
    answers: int
    user: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    completion_tokens: int = 0
    reasons: list[str] = field(default_factory=list)
    first_token: float | None = None
    begun: float = field(default_factory=time.monotonic)

    @property
    def usage(self) -> dict[str, int]:
        """The token counts, in OpenAI's form."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    @property
    def log_fields(self) -> dict[str, object]:
        """The request's fields in the log line."""
        described = {"id": self.id, "model": self.model, "user": self.user, "finish_reasons": self.reasons}
        return {**described, "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}

    @property
    def seconds(self) -> float:
        """Seconds since the request began."""
        return time.monotonic() - self.begun

    def describe(self) -> dict[str, object]:
        """Return the request's state as JSON."""
        running = self.seconds - (self.first_token or 0)
        return {
            "id": self.id,
            "tenant": self.tenant,
            "model": self.model,
            "tokens": self.completion_tokens,
            "tokens_per_second": round(self.completion_tokens / running, 2) if self.first_token is not None else 0.0,
            "seconds": round(self.seconds, 3),
        }
