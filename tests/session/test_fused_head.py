"""TRL's trainers on a compiled model as they stand: their fused head runs within its calls."""

import warnings

import datasets
import pytest
import torch
import transformers
import trl

import lorac
from lorac.testing import assert_close
from tests.refusing import refuses
from tests.trainer.runs import CPU, TEXTS, tokenizer
from tests.zoo import ZOO

SITES = ["q_proj", "down_proj"]
METHODS = {
    "dora": lorac.DoRA(r=2, alpha=4, targets=SITES),
    "x_lora": lorac.XLoRA(
        r=2, experts=3, hidden="model.norm", hidden_size=64, use_trainable_adapters=True, targets=SITES
    ),
}
STEPS = {**CPU, "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "no"}


def train(compiled, trainer_class, config, rows, folder, **arguments):
    """Train a compiled model by a trainer, and return its rows."""
    arguments = config(output_dir=str(folder), optim="sgd", **STEPS, **arguments)
    made = trainer_class(model=compiled, args=arguments, train_dataset=rows, processing_class=tokenizer())
    made.train()
    return made.train_dataset


@pytest.mark.slow("a method without a pass of its own", cases=["x_lora"])
@pytest.mark.parametrize("method", METHODS)
def test_trains_as_with_the_models_head(method, tmp_path):
    texts = datasets.Dataset.from_list([{"text": text} for text in (*TEXTS, TEXTS[0])])
    trained = []
    for plain in (False, True):
        torch.manual_seed(0)
        compiled = lorac.compile(ZOO["tiny_llama"].fresh(), {"a": METHODS[method]})
        if plain:
            labelled = {"data_collator": transformers.DataCollatorForSeq2Seq(tokenizer(), padding=True)}

            def trainer(labelled=labelled, **settings):
                return transformers.Trainer(**settings, **labelled)

            train(compiled, trainer, transformers.TrainingArguments, texts, tmp_path)
        else:
            arguments = {"gradient_checkpointing": True, "max_length": None}
            texts = train(compiled, trl.SFTTrainer, trl.SFTConfig, texts, tmp_path, **arguments)
        trained.append([tensor.detach().clone() for tensor in compiled.parameters() if tensor.requires_grad])
    torch.manual_seed(0)
    begun = lorac.compile(ZOO["tiny_llama"].fresh(), {"a": METHODS[method]})
    moved = (not torch.equal(a, b) for a, b in zip(trained[0], filter(_learns, begun.parameters()), strict=True))
    assert sum(moved) > len(trained[0]) // 2
    for one, other in zip(*trained, strict=True):
        assert_close(one, other)


def _learns(tensor):
    return tensor.requires_grad


def test_rejects_an_adapter_at_the_head_and_accepts_another_forward(tmp_path):
    texts = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
    compiled = lorac.compile(ZOO["tiny_llama"].fresh(), {"a": lorac.LoRA(r=2, targets=["lm_head"])})
    with refuses("unavailable", match="lm_head"), warnings.catch_warnings():
        train(compiled, trl.SFTTrainer, trl.SFTConfig, texts, tmp_path)
    compiled.forward = lambda **inputs: inputs
    assert compiled(x=1) == {"x": 1}
