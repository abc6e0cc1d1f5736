"""PEFT type ADAPTION_PROMPT.

Source: peft.tuners.adaption_prompt of PEFT 0.21. Each of the last adapter_layers attentions has `adaption_prompt` (1,
n, d) and `adaption_gate` (1,), under the path of the attention; lorac's sites are the attentions' output projections.
"""

from collections.abc import Mapping

from lorac.argument_types import JsonMapping
from lorac.formats._config_fields import Irrelevant, read_size
from lorac.formats.peft.fields import WITHOUT_FAN, own
from lorac.formats.peft.keys import PREFIX
from lorac.formats.peft.prompt_folder import PlacedType
from lorac.frontend.model_view import ModelView
from lorac.variants.adaption_prompt import AdaptionPrompt

_SIZES = ("adapter_len", "adapter_layers")


class AdaptionPromptType(PlacedType[AdaptionPrompt]):
    """ADAPTION_PROMPT."""

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
