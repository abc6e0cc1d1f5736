"""PEFT's prompts in files, whose sites the model determines, and modules that were trained whole.

Source: peft.utils.save_and_load and peft.peft_model of PEFT 0.21. ``prompt_embeddings`` is (n, d), or for keys and
values (n, 2·layers·heads·size): the output of the type's encoder, which is saved instead of the encoder. No key names
the input embedding, so the model determines it. Keys of whole modules begin with ``base_model.`` without ``model.``.
"""

import contextlib
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Generic

from torch import nn

from lorac.adapters.fit import check_adapter
from lorac.argument_types import JsonMapping
from lorac.errors import SiteError, list_some, require_base, unused_error
from lorac.formats._config_fields import Applied, Field, Irrelevant, read_size
from lorac.formats.peft.fields import WITHOUT_FAN
from lorac.formats.peft.keys import is_saved
from lorac.formats.peft.peft_type import PeftType, Tensors, V
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.site import Site, SiteKind
from lorac.variants.adapter import Adapter
from lorac.variants.base import PromptVariant

PROMPT, KEYS_VALUES = ({name: "prompt_embeddings"} for name in ("prompt", "keys_values"))
"""The key of a prompt, by its name in an adapter: embeddings, or keys and values."""
_PREFIX = "base_model."


def read_one(value: object) -> int:
    """Return 1, the number of submodules that get a prompt; null counts as 1."""
    if value not in (None, 1):
        raise ValueError("expected 1: of an encoder-decoder, PEFT puts tokens before both stacks")
    return 1


FIELDS: Mapping[str, Field] = {
    **{name: field for name, field in WITHOUT_FAN.items() if name != "target_modules"},
    "task_type": Irrelevant(preserved=True, write=lambda task: task or "CAUSAL_LM"),  # PEFT requires a task_type
    "num_virtual_tokens": Applied(to="num_virtual_tokens", read=read_size),
    "num_transformer_submodules": Applied(read=read_one),
    **dict.fromkeys(("token_dim", "num_attention_heads", "num_layers"), Irrelevant(preserved=True)),
}
"""Fields of all types."""


class PlacedType(PeftType[V], Generic[V]):
    """A PEFT type whose files do not name the sites of tensors, which the model determines."""

    @abstractmethod
    def make_variant(self, values: JsonMapping, view: ModelView) -> V:
        """Return the variant of a file's fields, with the model's sites as targets."""

    @abstractmethod
    def find_keys(self, path: str) -> Mapping[str, str]:
        """Return name of a tensor at a site -> its key in a file."""

    def read_folder(
        self, folder: AdapterFile, values: JsonMapping, tensors: Tensors, name: str, view: ModelView | None
    ) -> Adapter:
        view = require_base(
            view, f"the file of adapter '{name}' ({self.peft_type}) does not tell where in the model its prompts act"
        )
        variant = self.make_variant(values, view)
        keys = {key: (path, own) for path in variant.targets for own, key in self.find_keys(path).items()}
        rest = {key: value for key, value in tensors.items() if key not in keys}
        saved = {key.removeprefix(_PREFIX): value for key, value in rest.items() if key.startswith(_PREFIX)}
        if (
            len(saved) < len(rest)
            or not all(is_saved(key, variant.modules_to_save) for key in saved)
            or (not keys.keys() <= tensors.keys())
        ):
            raise unused_error(
                f"the file of adapter '{name}' holds {list_some(sorted(tensors))}, and {self.peft_type} has "
                f"{list_some(sorted(keys))} at this model, besides modules of modules_to_save",
                next_step="load the base model that it was trained on, or save the adapter again with PEFT",
            )
        adapter = Adapter(name, variant, replaced=saved, provenance={"source": str(folder)})
        for key, (path, own) in keys.items():
            adapter.tensors.setdefault(path, {})[own] = tensors[key]
        check_adapter(adapter, view)
        return adapter

    def write_folder(self, adapter: Adapter, view: ModelView | None) -> tuple[Tensors, Mapping[str, Adapter]]:
        at_sites = adapter.tensors.items()
        own = {key: at[name] for path, at in at_sites for name, key in self.find_keys(path).items()}
        return own | {_PREFIX + key: value for key, value in adapter.replaced.items()}, {}


class PromptType(PlacedType[PromptVariant]):
    """A PEFT type whose files store a prompt."""

    @property
    @abstractmethod
    def keys(self) -> Mapping[str, str]:
        """Name of a tensor -> its key in a file."""

    def find_keys(self, path: str) -> Mapping[str, str]:
        return self.keys

    def make_variant(self, values: JsonMapping, view: ModelView) -> PromptVariant:
        [cls] = self.variants
        fields = {field.to: values[key] for key, field in self.fields.items() if field.to}
        site = find_input_embedding(view, looks_up=self.keys != KEYS_VALUES)
        variant: Any = cls(**{**fields, "targets": (site.path,)})
        return variant if self.keys == KEYS_VALUES else variant.for_model(view)


def find_input_embedding(view: ModelView, *, looks_up: bool) -> Site:
    """Return the site of a model's input embedding.

    Args:
        looks_up: whether virtual tokens are looked up in the embedding.

    Raises:
        SiteError: the model has no input embedding, computes more than one scaled row per id, or is an encoder-decoder.
    """
    config, embedding = getattr(view.module, "config", None), None
    with contextlib.suppress(AttributeError, NotImplementedError):
        embedding = view.module.get_input_embeddings()  # type: ignore[operator]  # of transformers' models
    named = (path for path, module in view.module.named_modules() if module is embedding)
    site, kind = view.sites.get(next(named, "")) if isinstance(embedding, nn.Module) else None, type(embedding).__name__
    fault = "" if site and site.kind is SiteKind.EMBEDDING else "has no embedding of its input's ids"
    fault = "is an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else fault
    as_it_is = kind == "Embedding" or getattr(embedding, "embed_scale", None) is not None
    fault = fault or (f"changes the rows that its {kind} looks up" if looks_up and not as_it_is else "")
    if site is None or fault:
        raise SiteError(
            f"virtual tokens have no place in {type(view.module).__name__}, which {fault}",
            next_step="adapt layers, as LoRA does, or give a model of transformers with one stack",
        )
    return site
