"""TRL's trainers on a compiled model as they stand: their fused head runs within its calls."""

import warnings

import datasets
import peft
import pytest
import torch
import transformers
import trl

import lorac
from lorac.testing import assert_close
from tests.end_to_end.peft_cases import tie
from tests.peft_files import load_peft, quiet
from tests.refusing import refuses
from tests.trainer.runs import CPU, PAIRS, TEXTS, tokenizer
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


def test_accepts_another_forward():
    compiled = lorac.compile(ZOO["tiny_llama"].fresh(), {"a": lorac.LoRA(r=2, targets=["q_proj"])})
    compiled.forward = lambda **inputs: inputs
    assert compiled(x=1) == {"x": 1}


def test_rejects_dropout_at_the_head(tmp_path):
    texts = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
    compiled = lorac.compile(ZOO["tiny_llama"].fresh(), {"a": lorac.LoRA(r=2, targets=["lm_head"], dropout=0.1)})
    with refuses("unavailable", match="only the weight of 'lm_head'"), warnings.catch_warnings():
        train(compiled, trl.SFTTrainer, trl.SFTConfig, texts, tmp_path)


LABELLED = [
    {"prompt": p["prompt"], "completion": p[key], "label": key == "chosen"}
    for p in PAIRS
    for key in ("chosen", "rejected")
]
TASKS = {"dpo": (trl.DPOTrainer, trl.DPOConfig, PAIRS), "kto": (trl.KTOTrainer, trl.KTOConfig, LABELLED)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    ZOO["tiny_llama"].fresh().save_pretrained(folder)
    return folder


@pytest.mark.medium("another trainer of TRL's", keep=["dpo"])
@pytest.mark.parametrize("task", TASKS)
def test_rejects_the_base_as_reference_of_a_trained_adapter(task, saved, tmp_path):
    """Given as ``ref_model``, the reference is the adapter as it begins; a fresh one begins at the base."""
    trainer_class, config, rows = TASKS[task]
    model = transformers.LlamaForCausalLM.from_pretrained(saved)
    fresh = lorac.LoRA(r=2, targets=["q_proj"])
    rows = datasets.Dataset.from_list(rows)

    def begin(compiled, **settings):
        arguments = config(output_dir=str(tmp_path), **{**STEPS, "max_steps": 1, "learning_rate": 0.0})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = trainer_class(
                model=compiled, args=arguments, train_dataset=rows, processing_class=tokenizer(), **settings
            )
            made.train()
        return torch.tensor(made.state.log_history[0]["loss"])

    compiled = lorac.compile(model, {"a": fresh})
    begun = begin(compiled)
    with torch.no_grad():
        for tensor in compiled.adapters["a"].parameters():
            tensor.add_(0.2)
    with refuses("unavailable", match="loads the base as its reference, but adapter 'a' already changes it"):
        begin(compiled)
    reference = lorac.compile(model, dict(compiled.adapters)).eval()
    assert_close(begin(compiled, ref_model=reference), begun)


HEADS = {
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "tied_rows": {"target_modules": ["q_proj"], "trainable_token_indices": [97, 101, 116]},
}


@pytest.mark.medium("other tensors of the head", keep=["tied_rows"])
@pytest.mark.parametrize("name", HEADS)
def test_trains_the_head_as_peft_does(name, tmp_path):
    def host():
        model = ZOO["tiny_llama"].fresh()
        if name == "tied_rows":
            tie(model)
        return model

    texts = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
    with quiet():
        theirs = peft.get_peft_model(host(), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **HEADS[name]))
        theirs.save_pretrained(tmp_path / "begun")
    ours = lorac.compile(host(), {"a": tmp_path / "begun"})
    losses = []
    for model in (ours, theirs):
        with quiet():
            if name == "tied_rows" and model is theirs:  # TRL asks PEFT's wrapper of rows for a bias, and fails
                arguments = transformers.TrainingArguments(output_dir=str(tmp_path), **STEPS)
                collator = transformers.DataCollatorForSeq2Seq(tokenizer(), padding=True)
                made = transformers.Trainer(model, arguments, collator, texts)
            else:
                arguments = trl.SFTConfig(output_dir=str(tmp_path), **STEPS)
                made = trl.SFTTrainer(model, arguments, train_dataset=texts, processing_class=tokenizer())
            made.train()
        texts = made.train_dataset
        losses.append(torch.tensor([entry["loss"] for entry in made.state.log_history if "loss" in entry]))
    assert_close(*losses)
    lorac.save_adapter(ours.adapters["a"], tmp_path / "ended", model=host())
    ids = torch.tensor([[97, 101, 5, 116]])
    assert_close(load_peft(host(), tmp_path / "ended")(ids).logits, theirs.eval()(ids).logits)
