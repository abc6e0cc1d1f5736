"""Time, peak memory and losses of `lorac train`, compared with TRL's SFTTrainer over PEFT's LoRA.

    python -m benchmarks.recipe [--steps 5] [--length 128] [--batch 1] [--layers 30] [--processes 3]

Both sides train one LoRA from the same values on the same tokens by the same trainer, each in a process of its own;
the second PEFT is the first one again. A step is the median over the steps after the first; the peak is the high-water
mark while training, what is resident before it (imports, the model) included.
Targets: time <= 1.05 and peak <= 1.02 of PEFT's, losses equal to 1e-6.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

TARGETS = ["q_proj", "v_proj"]
LORAC, PEFT, AGAIN = SIDES = ("lorac", "peft", "peft again")


def jobs(given: argparse.Namespace) -> Sequence[common.Job]:
    """List the sides, each of which is a job."""
    return [(side,) for side in SIDES]


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, float]:
    """Seconds per step, the high-water mark in MiB, and the loss of every step."""
    import datasets
    import torch
    import transformers
    import trl

    (side,) = job
    tokens = torch.randint(
        10, 100, (given.batch * given.steps, given.length), generator=torch.Generator().manual_seed(0)
    )
    rows = datasets.Dataset.from_dict({"input_ids": tokens.tolist(), "labels": tokens.tolist()})
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"max_steps": given.steps, "per_device_train_batch_size": given.batch, "learning_rate": 1e-3}
        cpu = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False}
        rest = {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "report_to": "none"}
        ready = {"dataset_kwargs": {"skip_prepare_dataset": True}}
        config = trl.SFTConfig(output_dir=folder, **arguments, **cpu, **rest, **ready)
        begun, ended = [], []

        class Clock(transformers.TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                begun.append(time.perf_counter())

            def on_step_end(self, *_: Any, **__: Any) -> None:
                ended.append(time.perf_counter())

        trainer = _trainer(
            side,
            given,
            Path(folder),
            args=config,
            train_dataset=rows,
            processing_class=_tokenizer(),
            callbacks=[Clock()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        common.forget_peak()
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    taken = [end - begin for begin, end in zip(begun, ended, strict=True)]
    return {
        "step": statistics.median(taken[1:] or taken),
        "peak": common.peak(),
        **{f"loss {index}": loss for index, loss in enumerate(losses)},
    }


def _trainer(side: str, given: argparse.Namespace, folder: Path, **options: Any) -> Any:
    import peft
    import torch
    import trl

    import lorac
    from lorac.trainer import Recipe
    from lorac.trainer.trainer import adapter_trainer

    model = common.host(given)
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=given.rank, lora_alpha=given.rank, target_modules=TARGETS)
    wrapped = peft.get_peft_model(model, settings)
    if side != LORAC:
        return trl.SFTTrainer(model=wrapped, **options)
    wrapped.save_pretrained(folder / "begun")
    model = wrapped.unload()
    compiled = lorac.compile(model, {"a": folder / "begun"})
    recipe = Recipe(adapters={"a": {"path": str(folder / "begun")}})
    return adapter_trainer(trl.SFTTrainer)(recipe=recipe, model=compiled, **options)


def _tokenizer() -> Any:
    """Return a tokenizer that has nothing to do: the rows are tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Return one row for the time, one for the peak, and one for the largest difference of two losses."""
    ours, theirs, again = (found[(side,)] for side in SIDES)
    rows, a_a = [], {}
    for what, unit, factor in (("step", "ms", 1e3), ("peak", "MiB", 1.0)):
        a_a[what] = again[what] / theirs[what]
        shown = (f"{side[what] * factor:.0f} {unit}" for side in (ours, theirs))
        rows.append((what, *shown, f"{a_a[what]:.3f}", f"{ours[what] / theirs[what]:.3f}"))
    apart = max(abs(ours[key] - theirs[key]) for key in _losses(ours))
    apart_again = max(abs(again[key] - theirs[key]) for key in _losses(ours))
    rows.append(("losses", "", "", f"{apart_again:.1e}", f"{apart:.1e}"))
    title = (
        f"SFTTrainer on {given.model} ({given.layers} layers), LoRA of r = {given.rank}, "
        f"{given.batch} x {given.length} tokens; targets: step <= 1.05, peak <= 1.02, losses <= 1e-6 apart"
    )
    columns = ("", "lorac", "peft", "A/A", "lorac / peft")
    return [common.Table(title, columns, rows, [("step",), ("peak",), ("losses",)], a_a)]


def _losses(side: Mapping[str, Any]) -> list[str]:
    return [key for key in side if key.startswith("loss ")]


BENCHMARK = common.Benchmark(
    name="recipe",
    text=__doc__,
    options=(
        common.TEXT_MODEL,
        common.layers(30),
        common.Option("steps", 8, smoke=2, help="of the optimizer"),
        common.Option("length", 128, smoke=8, help="of a row, in tokens"),
        common.Option("batch", 1, smoke=1, help="rows of a step"),
        common.Option("rank", 8, smoke=2, help="of the adapter"),
    ),
    jobs=jobs,
    measure=measure,
    tables=tables,
    rooms=common.TRAINING,
)

if __name__ == "__main__":
    BENCHMARK.main()
