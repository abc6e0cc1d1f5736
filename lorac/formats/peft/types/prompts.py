"""PEFT types PROMPT_TUNING, MULTITASK_PROMPT_TUNING, P_TUNING, CPT, PREFIX_TUNING, CARTRIDGE and ADAPTION_PROMPT.

Source: the modules of peft.tuners with these names, of PEFT 0.21. The types differ in the encoder that computes the
prompt in training; a file stores the computed prompt (``lorac.formats.peft.prompt_folder``).
"""

from collections.abc import Mapping

from lorac.argument_types import JsonMapping
from lorac.formats._config_fields import Applied, Irrelevant, read_size
from lorac.formats.peft.fields import WITHOUT_FAN, own, trained
from lorac.formats.peft.keys import PREFIX
from lorac.formats.peft.prompt_folder import FIELDS, KEYS_VALUES, PROMPT, PlacedType, PromptType
from lorac.frontend.model_view import ModelView
from lorac.variants.adaption_prompt import AdaptionPrompt
from lorac.variants.prompt_tuning import MultitaskPromptTuning, PrefixTuning, PromptTuning

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
    fields = {**FIELDS, **trained(prompt_tuning_init="RANDOM", **_STARTS)}


class MultitaskPromptTuningType(PromptType):
    """MULTITASK_PROMPT_TUNING."""

    peft_type, variants = "MULTITASK_PROMPT_TUNING", {MultitaskPromptTuning: {}}
    keys = {**PROMPT, "task_cols": "prefix_task_cols", "task_rows": "prefix_task_rows"}
    fields = {
        **FIELDS,
        **{name: Applied(1, to=name, read=read_size) for name in ("num_tasks", "num_ranks")},
        **trained(prompt_tuning_init="RANDOM", prompt_tuning_init_task=0, **_STARTS),
        **trained(prompt_tuning_init_state_dict_path=None),
    }


class PTuningType(PromptType):
    """P_TUNING."""

    peft_type, keys, variants = "P_TUNING", PROMPT, {PromptTuning: {}}
    fields = {**FIELDS, **trained(encoder_dropout=0.0, **_ENCODER)}


class CptType(PromptType):
    """CPT."""

    peft_type, keys, variants = "CPT", PROMPT, {PromptTuning: {}}
    fields = {**FIELDS, **trained(opt_weighted_loss_type="none", opt_loss_decay_factor=1.0, **_PROJECTIONS, **_MASKS)}


class PrefixTuningType(PromptType):
    """PREFIX_TUNING."""

    peft_type, keys, variants = "PREFIX_TUNING", KEYS_VALUES, {PrefixTuning: {}}
    fields = {**_KEYS_VALUES, **trained(init_weights=None, encoder_hidden_size=None, prefix_projection=False)}


class CartridgeType(PromptType):
    """CARTRIDGE."""

    peft_type, keys, variants = "CARTRIDGE", KEYS_VALUES, {PrefixTuning: {}}
    fields = {**_KEYS_VALUES, **trained(num_frozen_tokens=1)}


_SIZES = ("adapter_len", "adapter_layers")


class AdaptionPromptType(PlacedType[AdaptionPrompt]):
    """ADAPTION_PROMPT.

    Source: peft.tuners.adaption_prompt of PEFT 0.21. Each of the last adapter_layers attentions has `adaption_prompt`
    (1, n, d) and `adaption_gate` (1,), under the path of the attention; lorac's sites are the attentions' output
    projections.
    """

    peft_type = "ADAPTION_PROMPT"
    variants = {AdaptionPrompt: {}}
    fields = {
        **{name: field for name, field in WITHOUT_FAN.items() if name != "modules_to_save"},
        "target_modules": Irrelevant(preserved=True),  # the keys name the attentions
        **own(read_size, **dict.fromkeys(_SIZES)),
    }

    def make_variant(self, values: JsonMapping, view: ModelView) -> AdaptionPrompt:
        return AdaptionPrompt.of(view.module, **{name: values[name] for name in _SIZES})

    def find_keys(self, path: str) -> Mapping[str, str]:
        attention = path.rpartition(".")[0]
        return {name: f"{PREFIX}{attention}.{name}" for name in ("adaption_prompt", "adaption_gate")}
