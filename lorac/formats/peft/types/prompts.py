"""PEFT types PROMPT_TUNING, MULTITASK_PROMPT_TUNING, P_TUNING, CPT, PREFIX_TUNING and CARTRIDGE.

Source: the modules of peft.tuners with these names, of PEFT 0.21. The types differ in the encoder that computes the
prompt in training; a file stores the computed prompt (``lorac.formats.peft.prompt_folder``).
"""

from lorac.formats._config_fields import Applied, Field, TrainingOnly, read_size
from lorac.formats.peft.prompt_folder import FIELDS, KEYS_VALUES, PROMPT, PromptType
from lorac.variants.multitask_prompt_tuning import MultitaskPromptTuning
from lorac.variants.prefix_tuning import PrefixTuning
from lorac.variants.prompt_tuning import PromptTuning


def _trained(**defaults: object) -> dict[str, Field]:
    """Return fields that only the encoder reads in training, by name and PEFT's default."""
    return {name: TrainingOnly(default, preserved=True) for name, default in defaults.items()}


_STARTS = {"prompt_tuning_init_text": None, "tokenizer_name_or_path": None, "tokenizer_kwargs": None}
_PROJECTIONS = {"opt_projection_epsilon": 0.1, "opt_projection_format_epsilon": 0.1}
_MASKS = {"cpt_token_ids": None, "cpt_mask": None, "cpt_tokens_type_mask": None, "tokenizer_name_or_path": None}
_ENCODER = {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": None, "encoder_num_layers": 2}
_KEYS_VALUES = {
    **FIELDS,
    **{name: Applied(to=name, read=read_size) for name in ("token_dim", "num_attention_heads", "num_layers")},
}


class PromptTuningType(PromptType):
    """PROMPT_TUNING."""

    peft_type, keys, variants = "PROMPT_TUNING", PROMPT, {PromptTuning: {}}
    fields = {**FIELDS, **_trained(prompt_tuning_init="RANDOM", **_STARTS)}


class MultitaskPromptTuningType(PromptType):
    """MULTITASK_PROMPT_TUNING."""

    peft_type, variants = "MULTITASK_PROMPT_TUNING", {MultitaskPromptTuning: {}}
    keys = {**PROMPT, "task_cols": "prefix_task_cols", "task_rows": "prefix_task_rows"}
    fields = {
        **FIELDS,
        **{name: Applied(1, to=name, read=read_size) for name in ("num_tasks", "num_ranks")},
        **_trained(prompt_tuning_init="RANDOM", prompt_tuning_init_task=0, **_STARTS),
        **_trained(prompt_tuning_init_state_dict_path=None),
    }


class PTuningType(PromptType):
    """P_TUNING."""

    peft_type, keys, variants = "P_TUNING", PROMPT, {PromptTuning: {}}
    fields = {**FIELDS, **_trained(encoder_dropout=0.0, **_ENCODER)}


class CptType(PromptType):
    """CPT."""

    peft_type, keys, variants = "CPT", PROMPT, {PromptTuning: {}}
    fields = {**FIELDS, **_trained(opt_weighted_loss_type="none", opt_loss_decay_factor=1.0, **_PROJECTIONS, **_MASKS)}


class PrefixTuningType(PromptType):
    """PREFIX_TUNING."""

    peft_type, keys, variants = "PREFIX_TUNING", KEYS_VALUES, {PrefixTuning: {}}
    fields = {**_KEYS_VALUES, **_trained(init_weights=None, encoder_hidden_size=None, prefix_projection=False)}


class CartridgeType(PromptType):
    """CARTRIDGE."""

    peft_type, keys, variants = "CARTRIDGE", KEYS_VALUES, {PrefixTuning: {}}
    fields = {**_KEYS_VALUES, **_trained(num_frozen_tokens=1)}
