"""X-LoRA in files: LoRAs in folders of their own, and the complete classifier that weights them.

The experts are in subfolders of the classifier's folder. The paths in a configuration may be outside of it, where PEFT
looks for them; lorac reads nothing there. In lorac's own folders the classifier's file stores the experts' seals, which
its own seal covers.

PEFT up to 0.21 drops tensors of the classifier when it saves: with n experts it takes keys that contain ``.0.`` to
``.<n − 1>.`` for keys of experts. When PEFT loads such a file, the missing layers are random. lorac refuses such a
file, and also the experts' folders that PEFT writes, which lack tensors for the same reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorac.adapters.fit import check_adapter
from lorac.adapters.router_freezing import freeze_router
from lorac.argument_types import JsonMapping
from lorac.errors import BaseNeeded, SiteError, nearest_name, require_base, shape_error, unused_error
from lorac.formats._config_fields import (
    EXPERTS,
    SEAL,
    Applied,
    Field,
    TrainingOnly,
    read_flag,
    read_number,
    read_optional_size,
    read_size,
)
from lorac.formats._errors import corrupt_error, unsupported_error
from lorac.formats.peft.fields import own
from lorac.formats.peft.reader import read_folder
from lorac.formats.peft.writer import CONFIG, WEIGHTS
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.frontend.transformer_blocks import find_last_hidden_state
from lorac.storage.strict_json import parse_object
from lorac.variants.adapter import Adapter
from lorac.variants.lora import LoRA
from lorac.variants.x_lora import XLoRA


def read_expert_paths(value: object) -> dict[str, str]:
    """Return name of an expert -> its path; an empty mapping is refused."""
    if not isinstance(value, dict) or not value or not all(isinstance(path, str) for path in value.values()):
        raise ValueError("expected the paths of LoRAs by name")
    return dict(value)


CLASSIFIER_FIELDS: Mapping[str, Field] = {
    "adapters": Applied(read=read_expert_paths),
    **own(read_flag, enable_softmax=True, enable_softmax_topk=False, layerwise_scalings=False),
    **own(read_number, softmax_temperature=1.0, scaling_pass_value=0.0, global_scaling_weight=1.0),
    "xlora_depth": Applied(1, to="depth", read=read_size),
    "xlora_size": Applied(2048, to="size", read=read_size),
    "xlora_dropout_p": TrainingOnly(0.2, to="dropout_p", read=read_number),
    "use_trainable_adapters": TrainingOnly(False, to="use_trainable_adapters", read=read_flag),
    "top_k_lora": Applied(to="top_k_lora", read=read_optional_size),
}
"""Fields that the configurations of PEFT and of the authors have in common."""


@dataclass(frozen=True)
class XLoraFolder:
    """The content of an X-LoRA folder.

    Attributes:
        experts: name -> the possible paths of the expert in the folder, in order of preference.
        fields: hyper-parameters of the method by lorac's names, ``hidden_size`` among them.
        classifier: the tensors of the classifier, by key.
        keys: key of each layer's weight, in order; the key of its bias ends in ``bias`` instead.
        weights: the name of the classifier's file.
        biased: whether the layers have biases.
    """

    folder: AdapterFile
    experts: Mapping[str, Sequence[str]]
    fields: JsonMapping
    classifier: Mapping[str, Tensor]
    keys: Sequence[str]
    weights: str
    biased: bool = True

    def read(self, name: str, view: ModelView | None) -> Adapter:
        """Read the adapter, and check it against the model.

        Raises:
            BaseNeeded: no model is given, or the module of its last hidden state is unknown.
            FormatError: the classifier or an expert is incomplete, the file has further tensors, or an expert is not
                the one that lorac wrote.
            AdapterError: the classifier does not fit the model.
        """
        view = require_base(
            view, f"the files of adapter '{name}' do not say which output of the model its classifier reads"
        )
        try:  # no file names the module whose output the classifier reads
            hidden, width = find_last_hidden_state(view.module)
        except SiteError as error:
            raise BaseNeeded(
                f"the classifier of adapter '{name}' reads the last hidden state, and {error.what}",
                next_step="compile from a model of transformers, with the folder in adapters=",
            ) from error
        if width != self.fields["hidden_size"]:
            raise shape_error(
                f"adapter '{name}': its classifier reads {self.fields['hidden_size']} values of a token, and "
                f"'{hidden}' gives {width}",
                next_step="load the base model that the adapter was trained on",
            )
        self._check_classifier(name)
        loras = self._read_experts(view)
        adapter = XLoRA.from_loras(loras, sites=list(view.sites), name=name, hidden=hidden, **self.fields)
        initial = adapter.tensors[adapter.sites[0]]
        shared = {}
        for j, key in enumerate(self.keys):
            bias = self.classifier.get(_bias_key(key))
            shared[f"classifier_{j}_weight"] = self.classifier[key]
            shared[f"classifier_{j}_bias"] = torch.zeros_like(initial[f"classifier_{j}_bias"]) if bias is None else bias
        for tensors in adapter.tensors.values():
            tensors.update(shared)
        adapter.provenance |= {"source": str(self.folder)}
        check_adapter(adapter, view)
        return adapter

    def _check_classifier(self, name: str) -> None:
        expected = [key for key in self.keys for key in ((key, _bias_key(key)) if self.biased else (key,))]
        missing = [key for key in expected if key not in self.classifier]
        if missing:
            dropped = all({*key.split(".")} & {str(n) for n in range(len(self.experts))} for key in missing)
            raise corrupt_error(
                f"'{self.folder}' lacks '{missing[0]}', one of {len(missing)} of {len(expected)} tensors of the "
                f"classifier of '{name}'"
                + (f": PEFT drops keys with a number below {len(self.experts)} when it saves" if dropped else ""),
                next_step="save the state of internal_xlora_classifier from the trained model itself, and put its "
                "tensors into the file, behind base_model.internal_xlora_classifier."
                if dropped
                else None,
            )
        unexpected = [key for key in self.classifier if key not in expected]
        if unexpected:
            raise unused_error(
                f"'{self.folder}' holds a tensor '{unexpected[0]}' that its classifier does not have",
                nearest=nearest_name(unexpected[0], expected),
                next_step=f"keep the tensors of its configuration: {', '.join(expected)}",
            )
        # The configuration's widths are checked against the file's, before a classifier with these widths is allocated.
        hidden, size, depth = (int(self.fields[field]) for field in ("hidden_size", "size", "depth"))
        for j, key in enumerate(self.keys):
            inside, last = hidden if j == 0 else size, j == depth - 1
            shape = self.classifier[key].shape
            if len(shape) != 2 or shape[1] != inside or (not last and shape[0] != size):
                raise shape_error(
                    f"adapter '{name}': '{key}' is {tuple(shape)}, expected ({'…' if last else size}, {inside})",
                    next_step="copy or download the whole folder again",
                )

    def _read_experts(self, view: ModelView) -> list[Adapter]:
        folders: dict[str, AdapterFile] = {}
        for expert, paths in self.experts.items():
            places = map(self.folder.find_inside, paths)
            found = next((place for place in places if place is not None and place.has(CONFIG)), None)
            if found is None:
                raise corrupt_error(
                    f"'{self.folder}' mixes the expert {expert!r}, and has no folder of it",
                    next_step=f"put the expert's folder at '{self.folder.path / paths[-1]}'; paths that lead out of "
                    "the folder are not followed",
                )
            folders[expert] = found
        if len({*folders.values()}) < len(folders):
            raise corrupt_error(f"two experts of '{self.folder}' are one folder", next_step="name each of them once")
        sealed = self.folder.inside(self.weights).peek_metadata().get(EXPERTS)
        seals = None if sealed is None else parse_object(sealed, lambda reason: corrupt_error(f"{EXPERTS} {reason}"))
        for expert, folder in folders.items():
            if seals is not None and folder.inside(WEIGHTS).peek_metadata().get(SEAL) != seals.get(expert):
                raise corrupt_error(
                    f"'{folder}' is not the expert '{expert}' that lorac wrote with the classifier of '{self.folder}'",
                    next_step="copy the whole folder again",
                )
            if folder.inside(CONFIG).read_json().get("peft_type") == "XLORA":
                raise unsupported_error(
                    f"'{folder}', an expert of '{self.folder}', is an X-LoRA itself",
                    next_step="give plain LoRAs as the experts of an X-LoRA",
                )
        return [read_folder(folder, view, expert) for expert, folder in folders.items()]


def split_xlora(
    adapter: Adapter, view: ModelView | None, keys: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Adapter]]:
    """Split an X-LoRA into the tensors of its classifier, by key, and its experts as LoRAs, by number.

    Args:
        keys: key of each layer's weight, in order.

    Raises:
        BaseNeeded: each site has its own weights, whose order in a file is the order of sites in the model.
    """
    variant = adapter.variant
    assert isinstance(variant, XLoRA)
    shared = adapter.tensors[adapter.sites[0]]
    tensors = {key: shared[f"classifier_{j}_weight"] for j, key in enumerate(keys)}
    tensors |= {_bias_key(key): shared[f"classifier_{j}_bias"] for j, key in enumerate(keys)}
    if variant.layerwise_scalings:  # files have the rows in the order of the sites in the model
        what = f"the layers that adapter '{adapter.name}' weighs are numbered as they are met in the model"
        paths = [path for path in require_base(view, what).sites if path in adapter.tensors]
        order = torch.tensor([variant.targets.index(path) for path in paths])
        for key in (keys[-1], _bias_key(keys[-1])):
            tensors[key] = tensors[key].unflatten(0, (len(paths), -1))[order].flatten(0, 1)
    alone = Adapter(adapter.name, replace(variant, global_scaling_weight=1.0, scales=()), adapter.tensors)
    loras = {str(i): freeze_router(alone, row, name=str(i)) for i, row in enumerate(torch.eye(variant.experts))}
    for lora, scale in zip(loras.values(), variant.scales, strict=False):  # empty if B has the scales
        assert isinstance(lora.variant, LoRA)
        lora.variant = replace(lora.variant, alpha=scale * lora.variant.alpha)
    return tensors, loras


def _bias_key(key: str) -> str:
    return f"{key.removesuffix('weight')}bias"
