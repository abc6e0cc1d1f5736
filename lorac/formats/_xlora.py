"""X-LoRA in files: LoRAs in folders of their own, and the classifier that weighs them, which must be complete.

PEFT up to 0.21 drops tensors of the classifier when it saves: keys that contain ``.0.`` to ``.<n − 1>.`` for n experts
are taken for those of the experts. Loaded again, PEFT keeps random layers in their place; here such a file is refused.
The folders that it writes of the experts beside the classifier lack tensors for the same reason, so that experts are
looked for where the configuration says, and there last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorac.adapters.fit import check_adapter
from lorac.adapters.router_freezing import freeze_router
from lorac.errors import AdapterError, BaseNeeded, FormatError, SiteError, nearest_name
from lorac.frontend.last_hidden_state import find_last_hidden_state
from lorac.frontend.model_view import ModelView
from lorac.variants.adapter import Adapter
from lorac.variants.x_lora import XLoRA

Tensor = torch.Tensor


@dataclass(frozen=True)
class XLoraFolder:
    """What a folder holds of an X-LoRA.

    Attributes:
        folder: where.
        experts: name -> where its files may lie, as the configuration has it.
        fields: of the method, by its names for them; ``hidden_size`` among them.
        classifier: the tensors of the classifier, by key.
        keys: key of the weight of each layer, in order; the bias's ends in ``bias`` instead.
        biased: whether the layers have biases.
    """

    folder: Path
    experts: Mapping[str, str]
    fields: Mapping[str, Any]
    classifier: Mapping[str, Tensor]
    keys: Sequence[str]
    biased: bool = True

    def adapter(self, name: str, model: nn.Module | None, inside: Sequence[str]) -> Adapter:
        """The adapter, checked.

        Args:
            name: the adapter's.
            model: the base.
            inside: where an expert may lie, seen from the folder, in order: by ``{name}``, and at ``{path}``, which the
                configuration says, or as that is seen from here.

        Raises:
            BaseNeeded: no model was given, or it does not tell its last hidden state.
            FormatError: an expert or a tensor of the classifier is missing.
            FormatError: the classifier has another tensor.
            AdapterError: it is as wide as no layer of the model.
        """
        hidden = self._hidden(name, model)
        assert model is not None
        complete = self._complete(name)
        view = ModelView.of(model)
        sites = view.sites
        loras = [self._expert(known, inside, model) for known in self.experts]
        adapter = XLoRA.from_loras(loras, sites=list(sites), name=name, hidden=hidden, **self.fields)
        own = adapter.tensors[adapter.sites[0]]
        layers = zip(self.keys, range(len(self.keys)), strict=True)
        shared = {f"classifier_{j}_weight": complete[key] for key, j in layers}
        biases = {f"classifier_{j}_bias": complete.get(_bias(key)) for j, key in enumerate(self.keys)}
        shared |= {key: torch.zeros_like(own[key]) if bias is None else bias for key, bias in biases.items()}
        for tensors in adapter.tensors.values():
            tensors.update(shared)
        adapter.provenance |= {"source": str(self.folder)}
        check_adapter(adapter, view)
        return adapter

    def _hidden(self, name: str, model: nn.Module | None) -> str:
        """Which module gives what the classifier reads: no file tells it."""
        if model is None:
            raise BaseNeeded(
                f"the files of adapter '{name}' do not tell what of the model its classifier reads",
                next_step="pass model=",
            )
        try:
            path, width = find_last_hidden_state(model)
        except SiteError as error:
            raise BaseNeeded(
                f"the classifier of adapter '{name}' reads the last hidden state, and {error.args[0].splitlines()[0]}",
                next_step="compile from a model of transformers, with the folder in adapters=",
            ) from error
        if width != self.fields["hidden_size"]:
            raise AdapterError(
                f"adapter '{name}': its classifier reads {self.fields['hidden_size']} values of a token, and '{path}' "
                f"gives {width}",
                next_step="load the base model that the adapter was trained on",
                code="shape_mismatch",
            )
        return path

    def _complete(self, name: str) -> Mapping[str, Tensor]:
        """The classifier's tensors, all of them and no others."""
        expected = [key for key in self.keys for key in ((key, _bias(key)) if self.biased else (key,))]
        missing = [key for key in expected if key not in self.classifier]
        if missing:
            raise FormatError(
                f"'{self.folder}' lacks '{missing[0]}', one of {len(missing)} of {len(expected)} tensors of the "
                f"classifier of '{name}': PEFT drops keys with a number below {len(self.experts)} when it saves",
                next_step="save the state of internal_xlora_classifier from the trained model itself, and put its "
                "tensors into the file, behind base_model.internal_xlora_classifier.",
                code="corrupt_file",
            )
        strange = [key for key in self.classifier if key not in expected]
        if strange:
            raise FormatError(
                f"'{self.folder}' holds a tensor '{strange[0]}' that its classifier has no place for",
                nearest=nearest_name(strange[0], expected),
                next_step=f"by its configuration it has {', '.join(expected)}",
                code="unused_tensors",
            )
        return self.classifier

    def _expert(self, known: str, inside: Sequence[str], model: nn.Module) -> Adapter:
        """One LoRA: beside the classifier, or where the configuration says."""
        from lorac.formats import load_adapter

        told = Path(self.experts[known])
        places = [self.folder / place.format(name=known, path=told) for place in inside]
        places.insert(places.index(self.folder / told), told)
        found = next((place for place in places if place.is_dir()), None)
        if found is None:
            raise FormatError(
                f"'{self.folder}' mixes an expert '{known}', which is not at '{self.experts[known]}'",
                next_step=f"put its folder at '{self.folder / known}'",
                code="corrupt_file",
            )
        return load_adapter(found, model, known)


def split_xlora(
    adapter: Adapter, model: nn.Module | None, keys: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Adapter]]:
    """The tensors of an X-LoRA's classifier by key, and its experts as LoRAs, by their numbers.

    Args:
        adapter: the X-LoRA.
        model: the base.
        keys: key of the weight of each layer, in order.

    Raises:
        BaseNeeded: each site has weights of its own, and only the model tells the order of the sites.
    """
    variant = adapter.variant
    assert isinstance(variant, XLoRA)
    own = adapter.tensors[adapter.sites[0]]
    tensors = {key: own[f"classifier_{j}_weight"] for j, key in enumerate(keys)}
    tensors |= {_bias(key): own[f"classifier_{j}_bias"] for j, key in enumerate(keys)}
    for key in (keys[-1], _bias(keys[-1])):
        tensors[key] = _reorder_rows(adapter, variant, tensors[key], model)
    alone = Adapter(adapter.name, replace(variant, global_scaling_weight=1.0), adapter.tensors)
    return tensors, {str(i): freeze_router(alone, row, name=str(i)) for i, row in enumerate(torch.eye(variant.experts))}


def _reorder_rows(adapter: Adapter, variant: XLoRA, stored: Tensor, model: nn.Module | None) -> Tensor:
    """Rows of the classifier's last layer by the order of the sites in the model, by which files number them."""
    if not variant.layerwise_scalings:
        return stored
    if model is None:
        raise BaseNeeded(
            f"the layers that adapter '{adapter.name}' weighs are numbered as they are met in the model",
            next_step="pass model=",
        )
    met = [path for path in ModelView.of(model).sites if path in adapter.tensors]
    places = torch.tensor([variant.targets.index(path) for path in met])
    return stored.unflatten(0, (len(met), -1))[places].flatten(0, 1)


def _bias(key: str) -> str:
    return f"{key.removesuffix('weight')}bias"


def read_expert_paths(value: Any) -> dict[str, str]:
    """Name of an expert -> where it lies; one at least."""
    if not isinstance(value, dict) or not value or not all(isinstance(path, str) for path in value.values()):
        raise ValueError("expected the paths of LoRAs by name")
    return dict(value)
