"""A step of ``AdapterTrainer``: the recipe's optimizer, rules and losses over Trainer's own."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import lorac
from lorac import training
from lorac.testing import assert_close
from lorac.trainer.losses import EXPERTS
from tests.refusing import refuses
from tests.trainer.trainings import ROWS, compiled_of, plan, same, tensors_of, trainer_of
from tests.training.loops import data, host, trained
from tests.zoo import ZOO

TARGETS = ("q_proj", "v_proj")
LORA = lorac.LoRA(r=4, alpha=8, dropout=0.2, targets=TARGETS)
PLAN = plan()
SAMPLED = plan(loss=["sampled_selection_loss"])
MIXED = {"r": 2, "experts": 3, "targets": TARGETS}
ROUTED: dict[str, tuple[Any, dict[str, Any]]] = {
    "remix": (lorac.ReMix(top_k=1, **MIXED), {"loss": [{"name": "sampled_selection_loss", "draws": 3}]}),
    "meteora": (lorac.MeteoRA(top_k=1, train_experts=True, **MIXED), {"loss": ["gate_loss"]}),
    "x_lora": (
        lorac.XLoRA(hidden="model.norm", hidden_size=64, depth=2, size=8, use_trainable_adapters=True, **MIXED),
        {},
    ),
    "flylora": (lorac.FlyLoRA(r=6, top_k=2, targets=TARGETS), {"rules": ["Balanced"]}),
    "sora": (lorac.SoRA(r=4, targets=TARGETS), {"loss": [{"name": "gate_penalty", "weight": 0.1}]}),
}


@pytest.mark.medium("MeteoRA's", cases=["remix"])
@pytest.mark.slow("two of them", keep=["remix", "meteora"])
@pytest.mark.parametrize("name", ROUTED)
def test_every_trainable_tensor_of_routed_methods_moves(name: str, tmp_path: Path) -> None:
    variant, fields = ROUTED[name]
    recipe = plan(**fields)
    compiled = compiled_of({"a": variant}, recipe)
    rows = [{**row, **({EXPERTS: i % 3} if name == "meteora" else {})} for i, row in enumerate(ROWS)]
    before = {key: tensor.detach().clone() for key, tensor in compiled.named_parameters() if tensor.requires_grad}
    buffers = {key: tensor.clone() for key, tensor in compiled.named_buffers()}
    trainer_of(compiled, recipe, tmp_path, rows=rows, save_strategy="no", eval_dataset=rows).train()
    after = dict(compiled.named_parameters())
    assert before and not [key for key, tensor in before.items() if torch.equal(after[key], tensor)]
    if name == "flylora":
        assert any(not torch.equal(tensor, buffers[key]) for key, tensor in compiled.named_buffers())


def test_rejects_a_router_without_its_loss(tmp_path: Path) -> None:
    compiled = compiled_of({"a": ROUTED["remix"][0]}, PLAN)
    with pytest.raises(lorac.ChoiceError, match="'router' of adapter 'a'") as caught:
        trainer_of(compiled, PLAN, tmp_path)
    assert caught.value.next_step == "add loss: [sampled_selection_loss]"
    with pytest.raises(lorac.Unavailable, match="reads 'log_prob', which the model does not give"):
        trainer_of(compiled, SAMPLED, tmp_path)
    gates = plan(loss=["gate_loss"])
    with pytest.raises(lorac.Unavailable, match="the data has no column 'experts'"):
        trainer_of(compiled_of({"a": ROUTED["meteora"][0]}, gates), gates, tmp_path).train()


def test_sampled_selection_has_the_gradient_of_its_own_loop(tmp_path: Path) -> None:
    """Over rows of different lengths, of which each counts by its tokens."""
    recipe = plan(loss=[{"name": "sampled_selection_loss", "draws": 3}])
    batch = dict(data("tiny_llama", 1, rows=3)[0])
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0, 3:] = -100
    counted = (batch["labels"][:, 1:] != -100).sum()

    def rows_of(output: Any) -> Tensor:
        labels = torch.cat([batch["labels"]] * 3)[:, 1:]
        losses = torch.nn.functional.cross_entropy(output.logits[:, :-1].transpose(1, 2), labels, reduction="none")
        return losses.sum(1) * 3 / counted

    gradients = []
    for own in (True, False):
        compiled = compiled_of({"a": ROUTED["remix"][0]}, recipe)
        for number, tensor in enumerate(trained(compiled.train())):
            tensor.data.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
        trainer = trainer_of(compiled, recipe, tmp_path)
        trainer.current_gradient_accumulation_steps = 1
        torch.manual_seed(3)
        if own:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            training.sampled_selection_loss(compiled, inputs, rows_of, draws=3).backward()
        else:
            trainer.compute_loss(compiled, dict(batch), num_items_in_batch=counted).backward()
        gradients.append([tensor.grad for tensor in trained(compiled)])
    for found, expected in zip(*gradients, strict=True):
        assert_close(found, expected)


@pytest.mark.medium("training/test_every_rule.py, rule by rule")
def test_several_rules_act_together_and_some_do_not(tmp_path: Path) -> None:
    adapters = {"a": dataclasses.replace(LORA, dropout=0.0), "s": lorac.SoRA(r=2, targets=["down_proj"])}
    rules = [
        {"name": "LoRAPlus", "ratio": 4},
        {"name": "Preconditioned", "reg": 0.1},
        {"name": "ProximalGates", "threshold": 0.5},
    ]
    recipe = plan(rules=rules)
    ruled, plain = compiled_of(adapters, recipe), compiled_of(adapters, PLAN)
    trainer = trainer_of(ruled, recipe, tmp_path, save_strategy="no")
    trainer.train()
    assert [type(rule).__name__ for rule in trainer.rules] == ["LoRAPlus", "Preconditioned", "ProximalGates"]
    trainer_of(plain, PLAN, tmp_path, save_strategy="no").train()
    assert not same(ruled, plain)
    gates = ruled.adapters["s"].tensors
    assert any((own["gate"] == 0).any() for own in gates.values())
    for together, what in ((["LoRAPro", "LoRAPlus"], "rate"), (["Preconditioned", "Squeeze"], "direction")):
        named = [{"name": "Squeeze", "stages": [[4, 2], [2, 2]]} if name == "Squeeze" else name for name in together]
        wrong = plan(rules=named)
        with pytest.raises(lorac.ChoiceError, match=f"both decide the {what} for 'a' at"):
            trainer_of(compiled_of(adapters, wrong), wrong, tmp_path).train()


@pytest.mark.medium("a Llama and images", keep=["tiny_llama", "plain_conv"])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_bert", "tiny_t5", "plain_conv"])
def test_a_compiled_model_answers_a_trainer_as_the_host_does(name: str, tmp_path: Path) -> None:
    model = host(name)
    compiled = lorac.compile(model, {"a": lorac.LoRA(r=2, targets=ZOO[name].targets)})
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    asked = ("model_accepts_loss_kwargs", "label_names", "can_return_loss", "_loss_shifts_labels", "_signature_columns")
    answers = []
    for one in (model, compiled):
        trainer: Any = Trainer(one, arguments)
        trainer._set_signature_columns_if_needed()
        answers.append(
            [sorted(value) if isinstance(value := getattr(trainer, what), list) else value for what in asked]
        )
    assert answers[0] == answers[1]


def test_unequal_micro_batches_give_the_large_batchs_gradient(tmp_path: Path) -> None:
    rows = [{**row, "labels": row["labels"].clone()} for row in ROWS[:4]]
    for i, row in enumerate(rows):
        row["labels"][2 + i :] = -100
    found = []
    for size in (1, 2, 4):
        compiled = compiled_of({"a": dataclasses.replace(LORA, dropout=0.0)}, PLAN)
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1}
        recipe = plan(optimizer="SGD")
        trainer_of(compiled, recipe, tmp_path, rows=rows, save_strategy="no", learning_rate=1.0, **settings).train()
        found.append(tensors_of(compiled))
    for one in found[1:]:
        for name, tensor in one.items():
            assert_close(tensor, found[0][name])


def test_rejects_weight_decay_next_to_another_optimizer() -> None:
    with refuses("option_error", match="weight_decay is of the trainer's own optimizer"):
        plan(optimizer="SGD", arguments={"weight_decay": 0.1})


@pytest.mark.parametrize("plugin", ["deepspeed", "fsdp"])
def test_rejects_a_model_in_parts(plugin: str, tmp_path: Path) -> None:
    class Parted(Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            setattr(self, f"is_{plugin}_enabled", True)

    with refuses("unavailable", match="accelerate's DeepSpeed and FSDP split adapters"):
        trainer_of(compiled_of({"a": LORA}, PLAN), PLAN, tmp_path, base=Parted)


def test_a_quantised_base_has_adapters_to_train(tmp_path: Path) -> None:
    quantised: Any = copy.deepcopy(ZOO["tiny_llama"].model())
    quantised.is_quantized, quantised.hf_quantizer = True, SimpleNamespace(is_trainable=True)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="Please attach trainable adapters"):
        Trainer(quantised, arguments)
    Trainer(lorac.compile(quantised, {"a": LORA}), arguments)
