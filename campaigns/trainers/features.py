"""The features, their names in each library, and a recipe of lorac's that uses or is refused each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

LORA = {"method": "lora", "r": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}
PAIRS, CHATS = {"data": "pairs.jsonl"}, {"data": "chats.jsonl"}
GRPO = {"task": "grpo", "data": "prompts.jsonl", "reward_funcs": ["campaigns.trainers.work:count_odd"]}
CHECKS = {"test_size": 1, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}


def adapter(**fields: Any) -> dict[str, Any]:
    """Return the field ``adapters`` of one adapter."""
    return {"adapters": {"mine": fields}}


class Feature(NamedTuple):
    """A feature of other trainers.

    Attributes:
        name: what a user gets.
        axolotl, factory, trl: its name in Axolotl, LLaMA-Factory and TRL or transformers; empty where it has none.
        recipe: the fields of a recipe that uses it, which the page shows.
        calls: the options of each call of ``lorac train``, one after the other.
        more: further fields of that recipe, for the test's model and rows.
        model: the model's folder.
        processes: number of processes.
        needs: a library without which it is not run.
        refused: a part of the message by which lorac refuses it.
        holds: whether the run's folder shows the effect.
    """

    name: str
    axolotl: str
    factory: str
    trl: str
    recipe: Mapping[str, Any]
    calls: tuple[tuple[str, ...], ...] = ((),)
    more: Mapping[str, Any] = {}
    model: str = "llama"
    processes: int = 1
    needs: str | None = None
    refused: str | None = None
    holds: Callable[[Path], bool] | None = None


def has(*names: str) -> Callable[[Path], bool]:
    """Return whether a run's folder, or that of all runs, has some files."""
    return lambda folder: all(any((place / name).exists() for place in (folder, folder.parents[1])) for name in names)


FULL = {"method": "full", "targets": ["q_proj", "v_proj"]}
MESSAGES = {"weight": 3.0, "path": "texts.jsonl"}, {"weight": 1.0, "path": "more.jsonl"}
COLUMNS = {"data": {"path": "named.jsonl", "columns": {"prompt": "question", "completion": "response"}}}
SUMMED = {"mine": LORA, "sum": FULL}

THERE: Mapping[str, tuple[Feature, ...]] = {
    "Tasks": (
        Feature("texts", "`type: completion`", "`stage: pt`", "`SFTTrainer`", {"data": "texts.jsonl"}),
        Feature("chats", "`type: chat_template`", "`formatting: openai`", "`SFTTrainer`", CHATS),
        Feature("preferences", "`rl: dpo`", "`stage: dpo`", "`DPOTrainer`", {"task": "dpo", **PAIRS}),
        Feature(
            "IPO", "`rl: ipo`", "`pref_loss: ipo`", "`loss_type`", {"task": "dpo", "loss_type": ["ipo"]}, more=PAIRS
        ),
        Feature(
            "a mixture of preference losses",
            "`rpo_alpha`",
            "`pref_ftx`",
            "`loss_weights`",
            {"task": "dpo", "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
            more=PAIRS,
        ),
        Feature(
            "the reference's answers, computed first",
            "`precompute_ref_log_probs`",
            "",
            "`precompute_ref_log_probs`",
            {"task": "dpo", "precompute_ref_log_probs": True},
            more=PAIRS,
        ),
        Feature("KTO", "`rl: kto`", "`stage: kto`", "`KTOTrainer`", {"task": "kto", "data": "judged.jsonl"}),
        Feature("ORPO", "`rl: orpo`", "`pref_loss: orpo`", "`ORPOTrainer`", {"task": "orpo", **PAIRS}),
        Feature("SimPO", "`rl: simpo`", "`pref_loss: simpo`", "`CPOTrainer`", {"task": "simpo", **PAIRS}),
        Feature("CPO", "", "", "`CPOTrainer`", {"task": "cpo", **PAIRS}),
        Feature(
            "reward models",
            "`reward_model: true`",
            "`stage: rm`",
            "`RewardTrainer`",
            {"task": "reward", **PAIRS},
            model="reward",
        ),
        Feature("GRPO", "`rl: grpo`", "", "`GRPOTrainer`", GRPO, more={"num_generations": 2}),
        Feature(
            "several rewards with weights",
            "`reward_weights`",
            "",
            "`reward_weights`",
            {"reward_funcs": [*GRPO["reward_funcs"], "think_format_reward"], "reward_weights": [1.0, 0.5]},
            more={**GRPO, "data": "asked.jsonl", "num_generations": 2},
        ),
        Feature(
            "a model as reward",
            "`reward_funcs`",
            "",
            "`reward_funcs`",
            {"reward_funcs": ["reward/"]},
            more={**GRPO, "num_generations": 2},
        ),
        Feature("RLOO", "", "", "`RLOOTrainer`", {**GRPO, "task": "rloo"}, more={"num_generations": 2}),
        Feature(
            "images with text",
            "`processor_type`",
            "`media_dir`",
            "`SFTTrainer`",
            {"task": "vlm", "data": "seen.jsonl"},
            model="llava",
            more={**adapter(method="lora", r=2, targets=r".*language_model.*\.[qv]_proj"), "max_length": None},
        ),
        Feature(
            "encoder-decoders",
            "",
            "",
            "`Seq2SeqTrainer`",
            {"task": "seq2seq", "data": "answers.jsonl"},
            model="t5",
            more=adapter(method="lora", r=2, targets=["q", "v"]),
        ),
        Feature(
            "classes of texts",
            "",
            "",
            "`Trainer`",
            {"task": "sequence-classification", "data": "labels.jsonl"},
            model="bert",
            more=adapter(method="lora", r=2, targets=["query", "classifier"]),
        ),
        Feature(
            "classes of images",
            "",
            "",
            "`Trainer`",
            {"task": "image-classification", "data": "images/"},
            model="vit",
            more=adapter(method="lora", r=2, targets=["q_proj", "classifier"]),
        ),
    ),
    "Rows": (
        Feature("`.json`", "`ds_type: json`", "`file_name`", "`dataset_name`", {"data": "rows.json"}),
        Feature("`.csv`", "`ds_type: csv`", "`file_name`", "`dataset_name`", {"data": "rows.csv"}),
        Feature("`.parquet`", "`ds_type: parquet`", "`file_name`", "`dataset_name`", {"data": "rows.parquet"}),
        Feature("`.txt`, `.md`", "`ds_type: text`", "`file_name`", "`dataset_name`", {"data": "texts/"}),
        Feature("a saved folder", "`ds_type: arrow`", "`file_name`", "`dataset_name`", {"data": "saved/"}),
        Feature("compressed files", "`data_files`", "", "`dataset_name`", {"data": "rows.jsonl.gz"}),
        Feature("the hub", "`path`", "`hf_hub_url`", "`dataset_name`", {"data": "me/rows@main"}),
        Feature("splits", "`split`", "`split`", "`dataset_train_split`", {"data": {"path": "parts/", "split": "test"}}),
        Feature("Alpaca's columns", "`type: alpaca`", "`formatting: alpaca`", "", {"data": "alpaca.jsonl"}),
        Feature("ShareGPT's", "`field_messages`", "`formatting: sharegpt`", "", {"data": "shared.jsonl"}),
        Feature("prompt and answer", "`type: input_output`", "`columns`", "`completion`", {"data": "answers.jsonl"}),
        Feature("own columns", "`field_instruction`", "`columns`", "", COLUMNS),
        Feature("tools in chats", "`field_tools`", "`columns: {tools}`", "`tools`", {"data": "tools.jsonl"}),
        Feature(
            "several places", "`datasets`", "`dataset: a,b`", "`datasets`", {"data": ["texts.jsonl", "more.jsonl"]}
        ),
        Feature("shares of each", "", "`interleave_probs`", "", {"data": [*MESSAGES]}),
        Feature("streams", "`streaming`", "`streaming`", "`streaming`", {"streaming": True, "max_steps": 2}),
        Feature("a share to evaluate on", "`val_set_size`", "`val_size`", "`test_split_size`", {"test_size": 0.5}),
        Feature(
            "rows to evaluate on", "`test_datasets`", "`eval_dataset`", "`eval_dataset`", {"eval_data": "more.jsonl"}
        ),
        Feature(
            "a template by name",
            "`chat_template`",
            "`template`",
            "`chat_template_path`",
            {"chat_template": "chatml", **CHATS},
        ),
        Feature(
            "a template from a file",
            "`chat_template_jinja`",
            "",
            "`chat_template_path`",
            {"chat_template": "chat.jinja", **CHATS},
        ),
        Feature(
            "the loss of answers alone",
            "`train_on_inputs: false`",
            "`train_on_prompt: false`",
            "`assistant_only_loss`",
            {"assistant_only_loss": True},
            more={"chat_template": "chatml", **CHATS},
        ),
        Feature(
            "that of prompts too",
            "`train_on_inputs: true`",
            "`train_on_prompt: true`",
            "`completion_only_loss`",
            {"completion_only_loss": False},
            more={"data": "answers.jsonl"},
        ),
        Feature("a length", "`sequence_len`", "`cutoff_len`", "`max_length`", {"max_length": 16}),
        Feature(
            "packed rows",
            "`sample_packing`",
            "`packing`",
            "`packing`",
            {"packing": True, "packing_strategy": "wrapped", "max_length": 24},
        ),
        Feature(
            "rows without padding",
            "`batch_flattening`",
            "`neat_packing`",
            "`padding_free`",
            {"packing": True, "padding_free": True},
            more={"max_length": 64},
        ),
        Feature(
            "rows of similar length together",
            "`group_by_length`",
            "",
            "`train_sampling_strategy`",
            {"train_sampling_strategy": "group_by_length"},
        ),
    ),
    "Methods": (
        Feature(
            "LoRA of all linear layers",
            "`lora_target_linear`",
            "`lora_target: all`",
            "`LoraConfig`",
            adapter(method="lora", r=4, alpha=8, dropout=0.05, targets="all-linear"),
        ),
        Feature("some layers", "`peft_layers_to_transform`", "", "`LoraConfig`", adapter(**LORA, layers=[0])),
        Feature("rsLoRA", "`peft_use_rslora`", "`use_rslora`", "`LoraConfig`", adapter(**LORA, rslora=True)),
        Feature("DoRA", "`peft_use_dora`", "`use_dora`", "`LoraConfig`", adapter(**{**LORA, "method": "dora"})),
        Feature(
            "OFT",
            "",
            "`finetuning_type: oft`",
            "`OFTConfig`",
            adapter(method="oft", r=0, block_size=4, targets=["q_proj"]),
        ),
        Feature("PiSSA", "`peft_init_lora_weights`", "`pissa_init`", "`LoraConfig`", adapter(**LORA, start="PiSSA")),
        Feature("EVA", "`peft_init_lora_weights`", "", "`LoraConfig`", adapter(**LORA, start="EVA")),
        Feature("all of a weight", "no `adapter`", "`finetuning_type: full`", "no `peft_config`", adapter(**FULL)),
        Feature(
            "all of some layers' weights",
            "`unfrozen_parameters`",
            "`finetuning_type: freeze`",
            "",
            adapter(**FULL, layers=[1]),
        ),
        Feature(
            "a head and an embedding",
            "`lora_modules_to_save`",
            "`additional_target`",
            "`LoraConfig`",
            adapter(**LORA, modules_to_save=["lm_head", "embed_tokens"]),
        ),
        Feature(
            "rows of some tokens",
            "`peft_trainable_token_indices`",
            "",
            "`LoraConfig`",
            adapter(method="trainable_tokens", token_indices=[97, 101], targets=["embed_tokens"]),
        ),
        Feature(
            "an adapter that trains on",
            "`lora_model_dir`",
            "`adapter_name_or_path`",
            "`PeftModel`",
            adapter(path="begun/"),
        ),
        Feature("several adapters at once", "", "", "", {"adapters": {"one": LORA, "two": {**LORA, "r": 4}}}),
        Feature(
            "LoRA+", "`loraplus_lr_ratio`", "`loraplus_lr_ratio`", "", {"rules": [{"name": "LoRAPlus", "ratio": 16.0}]}
        ),
        Feature(
            "ReLoRA", "`relora`", "", "", {"rules": [{"name": "ReLoRA", "into": "sum", "every": 2}], "adapters": SUMMED}
        ),
        Feature(
            "GaLore",
            "`optimizer: galore_adamw`",
            "`use_galore`",
            "`optim: galore_adamw`",
            {"optimizer": {"name": "GaLoreAdamW", "rank": 4}, **adapter(**FULL)},
        ),
        Feature(
            "QLoRA (a model saved in NF4)",
            "`load_in_4bit`",
            "`quantization_bit`",
            "`load_in_4bit`",
            {"model": "nf4/"},
            model="nf4",
            needs="bitsandbytes",
        ),
    ),
    "Steps": (
        Feature("transformers' optimizers", "`optimizer`", "`optim`", "`optim`", {"optim": "adafactor"}),
        Feature("PyTorch's optimizers", "", "", "", {"optimizer": {"name": "NAdam", "momentum_decay": 0.01}}),
        Feature(
            "optimizers in 8 bits",
            "`adamw_bnb_8bit`",
            "`adamw_bnb_8bit`",
            "`adamw_bnb_8bit`",
            {"optim": "adamw_bnb_8bit"},
            needs="bitsandbytes",
        ),
        Feature(
            "optimizers without a schedule",
            "`schedule_free_adamw`",
            "`schedule_free_adamw`",
            "`schedule_free_adamw`",
            {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"},
            needs="schedulefree",
        ),
        Feature(
            "a cosine with a floor",
            "`cosine_min_lr_ratio`",
            "`lr_scheduler_type`",
            "`lr_scheduler_type`",
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        ),
        Feature("a warm-up", "`warmup_steps`", "`warmup_steps`", "`warmup_steps`", {"warmup_steps": 1}),
        Feature(
            "larger batches",
            "`gradient_accumulation_steps`",
            "`gradient_accumulation_steps`",
            "`gradient_accumulation_steps`",
            {"gradient_accumulation_steps": 2},
        ),
        Feature("bounded gradients", "`max_grad_norm`", "`max_grad_norm`", "`max_grad_norm`", {"max_grad_norm": 0.5}),
        Feature(
            "NEFTune",
            "`neftune_noise_alpha`",
            "`neftune_noise_alpha`",
            "`neftune_noise_alpha`",
            {"neftune_noise_alpha": 5.0},
        ),
        Feature(
            "label smoothing",
            "",
            "`label_smoothing_factor`",
            "`label_smoothing_factor`",
            {"label_smoothing_factor": 0.1},
        ),
        Feature("DFT", "", "`use_dft_loss`", "`loss_type: dft`", {"loss_type": "dft"}),
        Feature(
            "recomputed activations",
            "`gradient_checkpointing`",
            "`gradient_checkpointing`",
            "`gradient_checkpointing`",
            {"gradient_checkpointing": True},
        ),
        Feature("mixed precision", "`bf16`", "`bf16`", "`bf16`", {"bf16": True}),
        Feature(
            "`torch.compile`",
            "`torch_compile`",
            "`torch_compile`",
            "`torch_compile`",
            {"torch_compile": True},
            more={"torch_compile_backend": "aot_eager"},
        ),
        Feature(
            "a batch that fits the memory",
            "`auto_find_batch_size`",
            "`auto_find_batch_size`",
            "`auto_find_batch_size`",
            {"auto_find_batch_size": True},
        ),
    ),
    "Runs": (
        Feature(
            "several processes",
            "`accelerate launch`",
            "`torchrun`",
            "`accelerate launch`",
            {"ddp_backend": "gloo"},
            processes=2,
        ),
        Feature("a base in parts", "`fsdp`", "`fsdp`", "`fsdp`", {"fsdp": "full_shard"}, processes=2),
        Feature(
            "going on after a stop",
            "`resume_from_checkpoint`",
            "`resume_from_checkpoint`",
            "`resume_from_checkpoint`",
            {"save_steps": 1},
            calls=((), ("--resume",)),
            more=EVERY_STEP,
        ),
        Feature(
            "going on for longer",
            "`max_steps`",
            "`max_steps`",
            "`max_steps`",
            {"max_steps": 2},
            calls=((), ("--resume", "--override", "max_steps=4")),
            more=EVERY_STEP,
            holds=has("checkpoint-4"),
        ),
        Feature(
            "fields on the command line",
            "`axolotl train --…`",
            "`llamafactory-cli train …=`",
            "`trl sft --…`",
            {},
            calls=(("--override", "adapters.mine.r=4", "--override", "seed=3"),),
        ),
        Feature(
            "a grid of settings",
            "`axolotl train --sweep`",
            "",
            "",
            {},
            calls=(("--sweep", "seed=[1,2]"),),
            holds=has("seed=1/mine", "seed=2/mine"),
        ),
        Feature(
            "an early stop",
            "`early_stopping_patience`",
            "`early_stopping_steps`",
            "`EarlyStoppingCallback`",
            {"early_stopping_patience": 1},
            more={**CHECKS, "metric_for_best_model": "loss"},
        ),
        Feature(
            "the best checkpoint",
            "`load_best_model_at_end`",
            "`load_best_model_at_end`",
            "`load_best_model_at_end`",
            {"load_best_model_at_end": True},
            more=CHECKS,
        ),
        Feature(
            "few checkpoints",
            "`save_total_limit`",
            "`save_total_limit`",
            "`save_total_limit`",
            {"save_total_limit": 1},
            more=EVERY_STEP,
            holds=lambda folder: not (folder / "checkpoint-1").exists(),
        ),
        Feature("a picture of the losses", "", "`plot_loss`", "", {}, holds=has("loss.svg")),
        Feature(
            "trackers",
            "`use_tensorboard`",
            "`report_to`",
            "`report_to`",
            {"report_to": "tensorboard"},
            needs="tensorboard",
        ),
        Feature(
            "a merged model",
            "`axolotl merge-lora`",
            "`llamafactory-cli export`",
            "",
            {"merge": "merged/"},
            holds=has("merged/config.json"),
        ),
        Feature("a push to the hub", "`hub_model_id`", "`push_to_hub`", "`push_to_hub`", {"push": "me/mine"}),
    ),
}
"""Section of the page -> its features, each of which is run."""

REFUSED = (
    Feature(
        "DeepSpeed",
        "`deepspeed`",
        "`deepspeed`",
        "`deepspeed`",
        {"deepspeed": {"zero_optimization": {"stage": 3}}},
        refused="deepspeed",
    ),
    Feature(
        "a base in parts on the disk or the CPU",
        "`fsdp: [offload]`",
        "`fsdp`",
        "`fsdp`",
        {"fsdp": "full_shard offload"},
        refused="takes no cpu_offload=True",
    ),
    Feature(
        "more tokens than the embedding has",
        "`tokens`",
        "`resize_vocab`",
        "",
        {"model": "larger/"},
        model="larger",
        more={"data": "tokens.jsonl"},
        refused="the model's embedding",
    ),
    Feature(
        "LoftQ",
        "`loftq_config`",
        "",
        "`LoraConfig`",
        adapter(**LORA, start="LoftQ"),
        refused="there is no start 'LoftQ'",
    ),
    Feature("PPO", "", "`stage: ppo`", "", {"task": "ppo"}, refused="takes no task='ppo'"),
    Feature("process rewards", "`process_reward_model`", "", "", {"task": "prm"}, refused="takes no task='prm'"),
    Feature(
        "distillation",
        "`kd_trainer`",
        "",
        "`DistillationTrainer`",
        {"task": "distillation"},
        refused="takes no task='distillation'",
    ),
    Feature(
        "settings of the model",
        "`overrides_of_model_config`",
        "`rope_scaling`",
        "`model_init_kwargs`",
        {"model_init_kwargs": {"dtype": "bfloat16"}},
        refused="nearest: model",
    ),
    Feature(
        "the folder by its other name",
        "`output_dir`",
        "`output_dir`",
        "`output_dir`",
        {"output_dir": "runs"},
        refused="nearest: out",
    ),
    Feature(
        "an evaluation that generates, in parts",
        "",
        "`predict_with_generate`",
        "`predict_with_generate`",
        {"task": "seq2seq", "fsdp": "full_shard", "predict_with_generate": True},
        model="t5",
        more={**adapter(method="lora", r=2, targets=["q"]), "data": "answers.jsonl"},
        refused="processes that generate",
    ),
)
"""Features that lorac refuses by name."""

FOR_GPUS: Mapping[str, str] = {
    "flash attention": "`model:` of a folder whose config names it",
    "Liger's kernels": "`use_liger_kernel: true`",
    "vLLM for GRPO and RLOO": "`use_vllm: true`",
    "sequence and tensor parallelism": "no field",
    "float8, Unsloth's kernels": "no field",
}
"""Features of GPUs -> lorac's field; not run."""
ABSENT = (
    "audio and video", "the first rows of a place alone, and rows without duplicates", "a server of rewards",
    "agents with tools", "a graphical interface", "TRL's other experimental trainers (a script takes a compiled model)",
)  # fmt: skip
"""Features without a field."""
