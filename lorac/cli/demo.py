"""The main job, start to end: train two adapters, compile them into one ONNX Runtime engine, swap them while it runs.

SmolLM2-135M-Instruct learns to talk like a pirate (LoRA) and to answer in capital letters (SHiRA). Both then live in
one engine: the same prompt is answered by the base, the first, the second, both mixed, and the base again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorac.cli._models import load_with_tokenizer
from lorac.errors import OptionError
from lorac.session.model_folders import MODEL_HELP

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = "What is the sea?"
QUESTIONS = (
    ("What is the sky?", "the sky is the blue above us"),
    ("What is a tree?", "a tree is a tall green plant"),
    ("What is bread?", "bread is food baked from flour"),
    ("What is the moon?", "the moon is a rock in the sky"),
)
STYLES = {
    "pirate": lambda text: f"Arr, matey! {text.capitalize()}, says the captain!",
    "loud": lambda text: f"{text.upper()}!!!",
}
CHOICES = {"pirate": "pirate", "loud": "loud", "both": {"pirate": 0.6, "loud": 0.6}}
RATES = {"pirate": 2e-3, "loud": 4e-3}
STEPS, ROWS, ANSWER_TOKENS = 18, 2, 20


def demo(
    model: Annotated[str, typer.Argument(help=f"A chat model with SmolLM2's names of layers. {MODEL_HELP}")] = SMOLLM2,
) -> None:
    """Train two adapters on a chat model, compile both for ONNX Runtime, and swap and mix them: two minutes."""
    import torch
    from rich.console import Console

    import lorac

    console = Console(highlight=False)
    torch.manual_seed(0)
    console.rule("1  train two adapters in eager PyTorch")
    loaded, tokenizer = load_with_tokenizer(model)
    if None in (getattr(tokenizer, "pad_token", None), getattr(tokenizer, "eos_token", None)):
        raise OptionError(
            f"'{model}' has no tokenizer with tokens for padding and for the end",
            next_step="save one there: tokenizer.save_pretrained",
        )
    variants = {
        "pirate": lorac.LoRA(r=8, alpha=16, targets=["q_proj", "v_proj", "down_proj"]),
        "loud": lorac.SHiRA(r=16, targets=["o_proj", "down_proj"]),
    }
    eager = lorac.compile(loaded, variants)
    for name in variants:
        train(eager, tokenizer, name, console)

    console.rule("2  compile both into one ONNX Runtime engine")
    begun = time.perf_counter()
    engine = eager.export(target="onnxruntime", active=None, cache=True)
    console.print(f"compiled and self-tested in {time.perf_counter() - begun:.0f} s; nothing below rebuilds it\n")

    console.rule(f"3  swap while it runs: {PROMPT!r}")
    answers(engine, tokenizer, console)

    console.rule("4  the engine answers as eager does")
    parity(engine, eager, tokenizer, console)

    console.rule("5  the attention of one layer, as the passes rewrote it")
    header, *rows, footer = str(engine.graph["main"].after("insert").at("model.layers.0.self_attn")).splitlines()
    adapted = [row for row in rows if " adapted " in row or row.lstrip().startswith("+ ")]
    console.print("\n".join([header, *adapted, "  …", footer]), markup=False, soft_wrap=True)


def train(compiled: Any, tokenizer: Any, name: str, console: Console) -> None:
    """Train one adapter on its style; the other stays as it is."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    batch = examples(tokenizer, STYLES[name])
    compiled.swap(name)
    compiled.train()
    tensors = [t for t in compiled.adapters[name].parameters() if t.requires_grad]
    optimizer = torch.optim.AdamW(tensors, lr=RATES[name], weight_decay=0.0)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    first = last = 0.0
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=STEPS)
        for step in range(STEPS):
            rows = torch.arange(ROWS) + ROWS * (step % 2)
            loss = compiled(**{key: value[rows] for key, value in batch.items()}).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            first, last = first or loss.item(), loss.item()
            progress.update(task, advance=1, description=f"{name:7s} loss {last:5.3f}")
    compiled.eval()
    count = sum(t.numel() for t in tensors)
    method = type(compiled.adapters[name].variant).__name__
    console.print(f"{name}: {method}, {count:,} trained values, loss {first:.2f} -> {last:.2f}\n")


def examples(tokenizer: Any, style: Any) -> dict[str, Tensor]:
    """Return the questions with answers in a style; only the answers count in the loss."""
    tokenizer.padding_side = "right"
    rows = [(question(asked), style(told) + tokenizer.eos_token) for asked, told in QUESTIONS]
    batch = tokenizer([asked + told for asked, told in rows], return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, (asked, _) in enumerate(rows):
        labels[row, : len(tokenizer(asked)["input_ids"])] = -100
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def question(text: str) -> str:
    """Return a question in the model's chat format, without the system's turn that the template would add."""
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def answer(compiled: Any, tokenizer: Any) -> str:
    """Return the model's greedy continuation."""
    asked = tokenizer(question(PROMPT), return_tensors="pt")
    written = compiled.generate(**asked, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return str(tokenizer.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def answers(engine: Any, tokenizer: Any, console: Console) -> None:
    """Answer the prompt under each choice of adapters, then swap once more with every mixture cached."""
    from rich.table import Table
    from rich.text import Text

    choices = {"none": None, **CHOICES, "none again": None}
    first, said = {}, {}
    for label, choice in choices.items():
        first[label] = engine.swap(choice).seconds
        said[label] = answer(engine, tokenizer)
    table = Table("adapters", "answer", "first swap", "later swaps")
    for label, choice in choices.items():
        later = engine.swap(choice).seconds
        table.add_row(label, Text(said[label]), *(f"{seconds * 1e3:.2f} ms" for seconds in (first[label], later)))
    console.print(table)
    same = said["none"] == said["none again"]
    console.print(f"base before and after: {'the same' if same else 'DIFFERENT'}\n")


def parity(engine: Any, eager: Any, tokenizer: Any, console: Console) -> None:
    """Print the engine's difference to eager, as a share of the adapters' contribution."""
    import torch
    from rich.table import Table

    ids = tokenizer(question(PROMPT), return_tensors="pt")["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    table = Table("adapters", "difference / contribution")
    with torch.no_grad():
        base = eager(**inputs, adapters=None).logits
        for label, choice in CHOICES.items():
            reference = eager(**inputs, adapters=choice).logits
            emitted = engine(**inputs, adapters=choice).logits
            table.add_row(label, f"{(emitted - reference).norm() / (reference - base).norm():.1e}")
    console.print(table)


COMMANDS = (demo,)
