"""PEFT type ADAPTION_PROMPT.

Source: peft.tuners.adaption_prompt of PEFT 0.21. Each of the adapter_layers upper attentions has `adaption_prompt`
(1, n, d) and `adaption_gate` (1,), under the path of the attention; lorac's sites are their output projections.
"""

from collections.abc import Mapping

from torch import Tensor

from lorac.adapters.fit import check_adapter
from lorac.argument_types import JsonMapping
from lorac.errors import BaseNeeded, FormatError, list_some
from lorac.formats._config_fields import Applied, Irrelevant, read_size
from lorac.formats.peft.fields import WITHOUT_FAN
from lorac.formats.peft.keys import PREFIX
from lorac.formats.peft.peft_type import PeftType, Tensors, mismatched_shapes
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.site import Site
from lorac.variants.adapter import Adapter
from lorac.variants.adaption_prompt import AdaptionPrompt

_NAMES = ("adaption_prompt", "adaption_gate")


class AdaptionPromptType(PeftType[AdaptionPrompt]):
    """ADAPTION_PROMPT."""

    peft_type = "ADAPTION_PROMPT"
    variants = {AdaptionPrompt: {}}
    fields = {
        **{name: field for name, field in WITHOUT_FAN.items() if name != "modules_to_save"},
        "target_modules": Irrelevant(preserved=True),  # the keys tell the attentions
        "adapter_len": Applied(to="adapter_len", read=read_size),
        "adapter_layers": Applied(to="adapter_layers", read=read_size),
    }

    def read_site(self, variant: AdaptionPrompt, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        raise mismatched_shapes(path, stored, "ADAPTION_PROMPT adapts attentions")

    def read_folder(
        self, folder: AdapterFile, values: JsonMapping, tensors: Tensors, name: str, view: ModelView | None
    ) -> Adapter:
        if view is None:
            raise BaseNeeded(
                f"the file of adapter '{name}' (ADAPTION_PROMPT) does not tell the heads of the attentions",
                next_step="pass model=",
            )
        sizes = {key: values[key] for key in ("adapter_len", "adapter_layers")}
        variant = AdaptionPrompt.of(view.module, **sizes)
        keys = {key: (site, own) for site in variant.targets for own, key in _keys(site).items()}
        if keys.keys() != tensors.keys():
            raise FormatError(
                f"the file of adapter '{name}' holds {list_some(sorted(tensors))}, and the model's upper attentions "
                f"have {list_some(sorted(keys))}",
                next_step="load the base model that the adapter was trained on",
                code="unused_tensors",
            )
        adapter = Adapter(name, variant, provenance={"source": str(folder)})
        for key, (site, own) in keys.items():
            tensor = tensors[key]
            adapter.tensors.setdefault(site, {})[own] = tensor[0] if tensor.ndim == 3 else tensor
        check_adapter(adapter, view)
        return adapter

    def write_folder(self, adapter: Adapter, view: ModelView | None) -> tuple[Tensors, Mapping[str, Adapter]]:
        return {
            key: own[name][None] if name == _NAMES[0] else own[name]
            for path, own in adapter.tensors.items()
            for name, key in _keys(path).items()
        }, {}


def _keys(path: str) -> dict[str, str]:
    """Return tensor -> its key in a file, of the attention with that output projection."""
    return {name: f"{PREFIX}{path.rpartition('.')[0]}.{name}" for name in _NAMES}
