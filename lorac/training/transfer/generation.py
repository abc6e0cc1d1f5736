"""Texts in and out of a compiled language model: continuations, answers, and training on both."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorac.errors import Unavailable
from lorac.training.initialisation.activations import IGNORED, batches_error

PromptAnswer = tuple[str, str]
"""A prompt, and the text that is to come after it."""
_ROWS = 8
"""Prompts of a batch."""


def require_tokenizer(compiled: Any) -> Any:
    """Return the tokenizer of a compiled model.

    Raises:
        Unavailable: it has no tokenizer.
    """
    tokenizer = getattr(compiled, "tokenizer", None)
    if tokenizer is None:
        raise Unavailable(
            "the compiled model has no tokenizer, which a transfer needs",
            next_step="set compiled.tokenizer to the model's tokenizer",
        )
    return tokenizer


@torch.no_grad()
def continue_prompts(
    compiled: Any,
    prompts: Sequence[str],
    *,
    adapters: Any = None,
    rows: int = _ROWS,
    seed: int | None = None,
    **options: Any,
) -> list[str]:
    """Generate a continuation of each prompt, without the prompt and special tokens.

    Args:
        compiled: generates, and has a tokenizer.
        prompts: texts.
        adapters: the choice to generate with; None for the base.
        rows: prompts per batch.
        seed: of sampling.
        **options: options of ``generate``: max_new_tokens, do_sample, …
    """
    tokenizer = require_tokenizer(compiled)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    found: list[str] = []
    for start in range(0, len(prompts), rows):
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts[start : start + rows]]
        longest = max(map(len, ids))
        padded = torch.tensor([[filler] * (longest - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
        drawn = None if seed is None else seed + start
        answer = compiled.generate(
            input_ids=padded, attention_mask=mask, adapters=adapters, seed=drawn, pad_token_id=filler, **options
        )
        found += tokenizer.batch_decode(torch.as_tensor(answer)[:, longest:], skip_special_tokens=True)
    return found


@torch.no_grad()
def compare_answers(compiled: Any, prompts: Sequence[str], first: str, second: str, *, adapters: Any) -> list[bool]:
    """Return whether one answer is likelier than another after each prompt, by their first tokens; ties are no.

    Raises:
        Unavailable: the two begin with one token.
    """
    tokenizer = require_tokenizer(compiled)
    one, other = (tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in (first, second))
    if one == other:
        raise Unavailable(
            f"{first!r} and {second!r} begin with the same token", next_step="give answers that begin differently"
        )
    found: list[bool] = []
    for start in range(0, len(prompts), _ROWS):
        batch = _make_batch(tokenizer, [(prompt, "") for prompt in prompts[start : start + _ROWS]])
        logits = torch.as_tensor(
            compiled(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], adapters=adapters).logits
        )
        last = logits[torch.arange(len(logits)), batch["attention_mask"].sum(1) - 1]
        found += (last[:, one] > last[:, other]).tolist()
    return found


def make_training_batches(
    tokenizer: Any, pairs: Sequence[PromptAnswer], *, rows: int = 8, epochs: int = 1, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Make batches that train on the answers; the prompts' own tokens have no label.

    Args:
        tokenizer: the trained model's.
        pairs: prompts and answers; the tokenizer's end token, if any, is appended.
        rows: rows per batch.
        epochs: how often all pairs occur, each time in another order.
        seed: of the order.

    Raises:
        AdapterError: there are no pairs.
    """
    if not pairs:
        raise batches_error("there are no pairs to teach", next_step="give at least one prompt with its answer")
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(epochs):
        order = torch.randperm(len(pairs), generator=generator).tolist()
        for start in range(0, len(order), rows):
            batches.append(_make_batch(tokenizer, [pairs[i] for i in order[start : start + rows]]))
    return batches


def _make_batch(tokenizer: Any, pairs: Sequence[PromptAnswer]) -> dict[str, Tensor]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    split = []
    for prompt, answer in pairs:
        behind = tokenizer(answer, add_special_tokens=False)["input_ids"] + end if answer else []
        split.append((tokenizer(prompt)["input_ids"], behind))
    longest = max(len(before) + len(behind) for before, behind in split)
    ids, labels, mask = (torch.full((len(split), longest), value) for value in (0, IGNORED, 0))
    for row, (before, behind) in enumerate(split):
        length = len(before) + len(behind)
        ids[row, :length], mask[row, :length] = torch.tensor(before + behind), 1
        labels[row, len(before) : length] = torch.tensor(behind, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Return KL(teacher‖student) of the next token in nats, the mean over the tokens that have a label.

    Args:
        student, teacher: logits (rows, length, tokens); no gradient reaches the teacher's.
        labels: (rows, length), where ``IGNORED`` marks tokens that do not count.
    """
    counted = labels[:, 1:] != IGNORED
    own, wanted = (logits[:, :-1][counted].log_softmax(-1) for logits in (student, teacher.detach()))
    return F.kl_div(own, wanted, log_target=True, reduction="batchmean")


def fit(
    compiled: Any,
    batches: Sequence[dict[str, Tensor]],
    *,
    adapters: str,
    lr: float = 2e-4,
    teacher: Callable[[dict[str, Tensor]], Tensor] | None = None,
) -> None:
    """Train one adapter on batches with AdamW, without decay and with a rate that falls to 0, as in the paper.

    Args:
        compiled: of target eager.
        batches: one per step.
        adapters: the adapter's name; the others stay unchanged.
        lr: the first rate.
        teacher: batch -> logits (rows, length, tokens) to learn in place of the labels, by ``distillation_loss``.

    Raises:
        AdapterNotFound: there is no such adapter.
    """
    tensors = [tensor for tensor in compiled.adapters[adapters].parameters() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(tensors, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    mode = compiled.training
    compiled.train()
    for batch in batches:
        output = compiled(**batch, adapters=adapters)
        loss = output.loss if teacher is None else distillation_loss(output.logits, teacher(batch), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    compiled.train(mode)
