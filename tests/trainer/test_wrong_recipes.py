"""Wrong recipes: each is answered in a sentence or two, which a golden text shows, before anything is written."""

import functools
import json
import re

import pytest
import yaml

import lorac
from lorac.trainer import read_recipe, train
from tests import goldens
from tests.trainer.runs import CPU, LORA, PAIRS, recipe, tokenizer, write_rows
from tests.zoo import ZOO

ADAPTERS = "adapters: {mine: {method: lora, r: 2, targets: [q_proj]}}"
FILES = {
    "is empty": "",
    "is a list": "- adapters",
    "is text": "adapters",
    "has no adapters": "data: python-docs",
    "has adapters without any": "adapters: {}",
    "has adapters in a list": "adapters: [lora]",
    "has an adapter that is a word": "adapters: {mine: lora}",
    "ends in a bracket": "adapters: {mine: {method: lora",
    "has a tab": "adapters:\n\tmine: 1",
    "has a key twice": f"{ADAPTERS}\nseed: 1\nseed: 2",
    "has an adapter twice": "adapters: {a: {method: lora}, a: {method: dora}}",
    "has a key that is a switch": f"{ADAPTERS}\non: 1",
    "has a key that is a number": "adapters: {1: {method: lora}}",
    "has an alias": "adapters: &a {mine: {method: lora}}\nactive: *a",
    "holds itself": "&a [*a]",
    "laughs a billion times": "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]",
    "is deep": "[" * 3000,
    "is deep in maps": "a: " + "{a: " * 200,
    "is large": "# " + "x" * 40_000,
    "has an object of Python's": f"{ADAPTERS}\ndata: !!python/object/apply:os.system [ls]",
    "has a date": f"{ADAPTERS}\ndata: 2026-01-01",
    "has bytes": f"{ADAPTERS}\ndata: !!binary aGVsbG8=",
    "has a set": f"{ADAPTERS}\nactive: !!set {{mine}}",
    "is two documents": f"{ADAPTERS}\n---\n{ADAPTERS}",
    "has NaN": f"{ADAPTERS}\nlearning_rate: .nan",
    "has infinity": f"{ADAPTERS}\nlearning_rate: 1e999",
    "has a long number": f"{ADAPTERS}\nseed: {'9' * 30}",
    "has a very long number": f"{ADAPTERS}\nseed: {'9' * 5000}",
    "has half of a pair": f'{ADAPTERS}\ndata: "\\uD800"',
    "has a control character": f"{ADAPTERS}\ndata: \x07",
    "misspells a field": f"{ADAPTERS}\nrule: [LoRAPlus]",
    "misspells an argument": f"{ADAPTERS}\nmax_step: 3",
    "has an older name": f"{ADAPTERS}\nbatch_size: 3",
    "names the folder as transformers does": f"{ADAPTERS}\noutput_dir: runs",
    "resumes by a field": f"{ADAPTERS}\nresume_from_checkpoint: true",
    "loads the model by a field": f"{ADAPTERS}\nmodel_init_kwargs: {{dtype: float16}}",
    "gives arguments in a field": f"{ADAPTERS}\narguments: {{seed: 1}}",
    "has an unknown task": f"{ADAPTERS}\ntask: dp0",
    "has a rate that is text": f"{ADAPTERS}\nlearning_rate: fast",
    "has a rate below zero": f"{ADAPTERS}\nlearning_rate: -1e-3",
    "has no steps": f"{ADAPTERS}\nmax_steps: 0",
    "has no rows in a batch": f"{ADAPTERS}\nper_device_train_batch_size: 0",
    "has half a row in a batch": f"{ADAPTERS}\nper_device_train_batch_size: 1.5",
    "has a switch for a number": f"{ADAPTERS}\nmax_steps: yes",
    "has a model that is a list": f"{ADAPTERS}\nmodel: [a]",
    "has a rule without a list": f"{ADAPTERS}\nrules: LoRAPlus",
    "evaluates on two things": f"{ADAPTERS}\neval_data: python-docs\ntest_size: 3",
    "has an argument of another task": f"{ADAPTERS}\ntask: dpo\npacking: true",
    "trains an adapter at no strength": f"{ADAPTERS}\nactive: {{mine: 0.0}}",
    "needs rewards": f"{ADAPTERS}\ntask: grpo",
    "has rewards of another task": f"{ADAPTERS}\nreward_funcs: [think_format_reward]",
    "splits a stream": f"{ADAPTERS}\nstreaming: true\ntest_size: 2",
    "sees no batch": f"{ADAPTERS}\nstart_batches: 0",
    "names the model as LLaMA-Factory does": f"{ADAPTERS}\nmodel_name_or_path: a",
    "names the model as Axolotl does": f"{ADAPTERS}\nbase_model: a",
    "names rows as Axolotl does": f"{ADAPTERS}\ndatasets: [{{path: a, type: alpaca}}]",
    "names the length as LLaMA-Factory does": f"{ADAPTERS}\ncutoff_len: 512",
    "names the length as Axolotl does": f"{ADAPTERS}\nsequence_len: 512",
    "names the batch as Axolotl does": f"{ADAPTERS}\nmicro_batch_size: 2",
    "names the rows to test as Axolotl does": f"{ADAPTERS}\nval_set_size: 0.1",
    "names the task as Axolotl does": f"{ADAPTERS}\nrl: dpo",
    "names the rank as Axolotl does": f"{ADAPTERS}\nlora_r: 8",
    "packs as Axolotl does": f"{ADAPTERS}\nsample_packing: true",
}
WHOLE = ("is empty", "is a list", "is text", "is deep", "is large", "has a control character")
"""Files that are wrong as a whole, or at a byte."""
RUNS = {
    "an unknown method": {"adapters": {"mine": {"method": "lor"}}},
    "a hyper-parameter by PEFT's name": {"adapters": {"mine": {**LORA, "lora_alpha": 1}}},
    "targets by PEFT's name": {"adapters": {"mine": {"method": "lora", "target_modules": ["q_proj"]}}},
    "an unknown hyper-parameter": {"adapters": {"mine": {**LORA, "alhpa": 1}}},
    "no site": {"adapters": {"mine": {**LORA, "targets": ["q"]}}},
    "dropout at the head": {"adapters": {"mine": {**LORA, "targets": ["lm_head"], "dropout": 0.1}}},
    "an unknown start": {"adapters": {"mine": {**LORA, "start": "pissa2"}}},
    "an unknown rule": {"rules": ["LoraPlus"]},
    "an unknown optimizer": {"optimizer": "adamw"},
    "an optimizer that is not installed": {"optim": "lomo"},
    "a schedule without its settings": {"lr_scheduler_type": "cosine_with_min_lr"},
    "settings that a schedule has not": {"lr_scheduler_kwargs": {"x": 1}},
    "a seed below zero": {"seed": -1},
    "fewer workers than none": {"dataloader_num_workers": -1},
    "a base in parts by deepspeed": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    "a base in parts by FSDP": {"fsdp": "full_shard"},
    "a schedule": {"lr_scheduler_type": "cosin"},
    "two precisions": {"bf16": True, "fp16": True},
    "no such data": {"data": "python-dosc"},
    "damaged rows": {"data": '{"text": "a"}\n{"text": '},
    "rows without the columns": {"data": [{"txt": "a"}]},
    "fewer rows than a batch": {"dataloader_drop_last": True},
    "a row without text": {"data": [{"text": "a"}, {"text": None}]},
    "a number for text": {"data": [{"text": 1}]},
    "messages as text": {"data": [{"messages": "[]"}]},
    "labels as text": {"task": "kto", "data": [{"prompt": "a", "completion": "b", "label": "yes"}]},
    "no rows": {"data": [{"text": None}], "test_size": 1},
    "more rows to test than there are": {"data": [{"text": "a"}], "test_size": 3},
    "pairs for sft": {"data": PAIRS},
    "texts for dpo": {"task": "dpo", "data": [{"text": "a"}]},
    "a start from data of pairs": {"task": "dpo", "data": PAIRS, "adapters": {"mine": {**LORA, "start": "LoRAGA"}}},
    "an image in a turn": {"data": [{"messages": [{"role": "user", "content": [{"type": "image", "text": "x"}]}]}]},
    "a turn without a role": {"data": [{"messages": [{"content": "a"}]}]},
    "a conversation without turns": {"data": [{"messages": [{"role": "u", "content": "a"}]}, {"messages": []}]},
    "a token that is none": {"data": [{"text": "a"}], "eos_token": "<end>"},
    "packing without a length": {"data": [{"text": "a"}], "packing": True, "max_length": None},
    "an evaluation of nothing": {"data": [{"text": "a"}], "eval_strategy": "steps", "eval_steps": 1},
    "patience without an evaluation": {"data": [{"text": "a"}], "early_stopping_patience": 2},
    "answers alone of plain texts": {"data": [{"text": "a"}], "assistant_only_loss": True},
    "an unknown reward": {"task": "grpo", "data": [{"prompt": "a"}], "reward_funcs": ["nowhere:f"]},
    "an unknown chat template": {"data": [{"text": "a"}], "chat_template": "qwen33"},
    "a stream without a number of steps": {"data": [{"text": "a"}], "streaming": True},
    "no epoch": {"num_train_epochs": 0},
    "an unknown metric": {"data": [{"text": "a"}] * 2, "test_size": 1, "metric_for_best_model": "los"},
    "a method and a path": {"adapters": {"mine": {"method": "lora", "path": "a"}}},
    "a path of no adapter": {"adapters": {"mine": {"path": "nowhere/"}}},
    "a setting of an optimizer that it lacks": {"optimizer": {"name": "SGD", "betas": [0.9, 0.99]}},
    "a setting of a rule that it lacks": {"rules": [{"name": "LoRAPlus", "rate": 4}]},
    "a rule of another method": {"data": [{"text": "a"}], "rules": ["ProximalGates"]},
    "a loss without its router": {"data": [{"text": "a"}], "loss": ["sampled_selection_loss"]},
    "fewer draws than two": {"loss": [{"name": "sampled_selection_loss", "draws": 1}]},
    "a loss of preferences that there is not": {"task": "dpo", "data": PAIRS, "loss_type": ["ippo"]},
    "more weights than losses": {"task": "dpo", "data": PAIRS, "loss_type": ["ipo"], "loss_weights": [1.0, 2.0]},
    "more generations than a batch": {
        "task": "grpo", "data": [{"prompt": "a"}], "reward_funcs": ["think_format_reward"], "num_generations": 3,
    },
    "a packing strategy that there is not": {"data": [{"text": "a"}], "packing": True, "packing_strategy": "best"},
    "an end of epochs that is text": {"num_train_epochs": "three"},
    "two times to save": {"save_strategy": "steps", "save_steps": 0},
    "a best model without evaluations": {"data": [{"text": "a"}], "load_best_model_at_end": True},
    "a column of pairs that is a list": {"task": "dpo", "data": [{"chosen": 1, "rejected": "b"}]},
    "an empty conversation of ShareGPT's": {"data": [{"conversations": []}]},
    "an output that is a number": {"data": [{"instruction": "a", "output": 1}]},
}  # fmt: skip


FEW = {"an unknown method", "no site", "no epoch", "an unknown rule", "a schedule", "no such data", "pairs for sft"}
"""Runs that are wrong in one way each."""


def answer(name, work, fields, wrong):
    """Return what is said to a mistake, and note those without a sentence of lorac's or a field, a row or a line."""
    try:
        work()
        error = None
    except Exception as raised:
        error = raised
    if not (isinstance(error, lorac.LoracError) and error.next_step):
        wrong.append(f"{name}: {error!r}")
    elif not re.search(rf"\b({'|'.join(fields)})s?\b|\brow \d|\(line \d|^  change (?!the rows)", str(error), re.M):
        wrong.append(f"{name} names no field: {error}")
    return f"# a recipe that {name}\n{error}\n\n"


def list_fields(given):
    """List the names of fields, within each other too."""
    if isinstance(given, list):
        return [field for item in given for field in list_fields(item)]
    return (
        [*given, *(field for value in given.values() for field in list_fields(value))]
        if isinstance(given, dict)
        else []
    )


def test_each_file_is_answered_in_a_sentence(tmp_path):
    file, said, wrong = tmp_path / "recipe.yaml", "", []
    for name, text in FILES.items():
        file.write_text(text, encoding="utf-8")
        fields = re.findall(r"(\w\w+):", text.removeprefix(ADAPTERS))
        said += answer(name, lambda: read_recipe(file), [*fields, "adapters", *[""] * (name in WHOLE)], wrong)
    check("wrong_recipes", said, tmp_path)
    assert wrong == []


@pytest.mark.medium("a run that is wrong in each of six ways", cases=["more"])
@pytest.mark.parametrize("some", ["few", "more"])
def test_each_run_is_answered_in_a_sentence(some, tmp_path):
    said, wrong = "", []
    for index, (name, given) in enumerate(RUNS.items()):
        if (name in FEW) == (some == "few"):
            work = functools.partial(run, tmp_path / f"{index}", given)
            fields = {field.rstrip("s") for field in list_fields(given) if len(field) > 1} - {"mine"} | {"adapter"}
            said += answer(f"gives {name}", work, fields, wrong)
    check(f"wrong_runs_{some}", said, tmp_path)
    assert wrong == []


def test_rejects_a_token_that_the_embedding_lacks(tmp_path):
    larger, rows = tokenizer(), write_rows(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b<new>"}])
    size = ZOO["tiny_llama"].model().get_input_embeddings().num_embeddings
    larger.add_tokens([f"<{n}>" for n in range(size - len(larger))] + ["<new>"])
    match = f"row holds token {size}: the tokenizer has {size + 1} tokens, and the model's embedding {size}"
    with pytest.raises(lorac.OptionError, match=match):
        train(ZOO["tiny_llama"].model(), larger, recipe(rows), tmp_path / "out")


def check(golden, said, folder):
    """Compare with a golden text, without what TRL, transformers and datasets say."""
    said = re.sub(r"(refuses the recipe|cannot be read): .*", r"\1: …", said.replace(str(folder), "…"))
    goldens.check(golden, re.sub(r"(it is one of adalora), .*", r"\1, …", said))  # other tests' methods are too


def run(folder, given):
    """Train as a file says."""
    folder.mkdir()
    said = {"adapters": {"mine": LORA}, "data": [{"text": "a"}], **CPU, **given}
    if isinstance(said["data"], list):
        said["data"] = write_rows(folder / "rows.jsonl", said["data"])
    elif said["data"].startswith("{"):
        (folder / "rows.jsonl").write_text(said["data"])
        said["data"] = str(folder / "rows.jsonl")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(said))
    try:
        train(ZOO["tiny_llama"].model(), tokenizer(), read_recipe(folder / "recipe.yaml"), folder / "out")
    finally:
        assert not any((folder / "out").rglob("*"))


def test_an_exponent_is_a_number_and_fields_part_from_arguments(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{ADAPTERS}\nmodel: here\nout: there\nlearning_rate: 1e-3\nweight_decay: 1E2\ntest_size: .5\n")
    recipe = read_recipe(file)
    assert (recipe.model, recipe.out) == ("here", "there")
    assert recipe.arguments == {"learning_rate": 1e-3, "weight_decay": 100.0}
    assert recipe.test_size == 0.5
    assert json.dumps(recipe.adapters) == '{"mine": {"method": "lora", "r": 2, "targets": ["q_proj"]}}'
