"""A request for text that is being answered."""

import time
import uuid
from dataclasses import dataclass, field


@dataclass(eq=False)
class ActiveRequest:
    """A request that is being answered.

    Attributes:
        tenant: who asks.
        model: the adapters, as the request names them.
        adapters: their names in the compiled model.
        prompt_tokens: tokens of its prompts.
        answers: how many it gets.
        user: the client's own user, as the request's field ``user`` says.
        completion_tokens: tokens of its answers so far.
        reasons: why its answers ended.
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
        """The numbers of tokens, in OpenAI's form."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    @property
    def log_fields(self) -> dict[str, object]:
        """The fields of its line in the log."""
        described = {"id": self.id, "model": self.model, "user": self.user, "finish_reasons": self.reasons}
        return {**described, "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}

    @property
    def seconds(self) -> float:
        """How long it has taken."""
        return time.monotonic() - self.begun

    def describe(self) -> dict[str, object]:
        """Return its state as JSON."""
        running = self.seconds - (self.first_token or 0)
        return {
            "id": self.id,
            "tenant": self.tenant,
            "model": self.model,
            "tokens": self.completion_tokens,
            "tokens_per_second": round(self.completion_tokens / running, 2) if self.first_token is not None else 0.0,
            "seconds": round(self.seconds, 3),
        }
