"""A model in a folder: its structure on the meta device, whose tensors are read from its files one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lorac.argument_types import JsonMapping
from lorac.errors import CompileError, FormatError
from lorac.frontend.checkpoint_names import find_stored_names
from lorac.frontend.model_view import ModelView
from lorac.merging.tied_weights import find_ties
from lorac.session.model_folders import CONFIG, outline_model, read_model_config
from lorac.storage.sharded_tensors import RenamedTensors, ShardedTensors


@dataclass(frozen=True, eq=False)
class StoredModel:
    """A model in a folder.

    Attributes:
        folder: where it is.
        config: the contents of its configuration.
        tensors: its tensors by the names that they are stored under.
        keys: name in the model -> the name that it is stored under. A tied weight has one for each name that is stored.
        view: the model on the meta device, with its tensors as they are stored.
    """

    folder: Path
    config: JsonMapping
    tensors: ShardedTensors
    keys: Mapping[str, str]
    view: ModelView

    @classmethod
    def open(cls, folder: Path) -> StoredModel:
        """Open a folder that transformers or diffusers wrote.

        Raises:
            OptionError: its configuration is missing, or no model can be made of it.
            FormatError: its weights are missing, damaged, of other shapes, or not in safetensors files.
            CompileError: its weights are quantised.
        """
        config = read_model_config(folder)
        if config.get("quantization_config"):
            raise CompileError(
                f"'{folder}' holds a quantised model, into whose weights nothing can be merged",
                next_step="give the model as it was before, or load this one and save "
                "lorac.merge_into(model, adapters, dequantize=True)",
                code="not_mergeable",
            )
        tensors, model = ShardedTensors(folder), outline_model(folder)
        keys = find_stored_names(model, tensors)
        _check_shapes(folder, model, tensors, keys)
        for names in find_ties(model):
            first, *others = [name for name in names if name in keys] or names
            if any(not torch.equal(tensors[keys[first]], tensors[keys[name]]) for name in others if name in keys):
                separate_names(model, others)  # as transformers does where they are stored with different values
        _take_dtypes(model, tensors, keys)
        reads = dict(keys)
        for names in find_ties(model):
            stored = next((keys[name] for name in names if name in keys), None)
            reads |= {} if stored is None else {name: stored for name in names if name not in keys}
        return cls(
            folder,
            config,
            tensors,
            keys,
            dataclasses.replace(ModelView.of(model), stored=RenamedTensors(tensors, reads)),
        )


def separate_names(model: nn.Module, names: Iterable[str]) -> None:
    """Give each of some names of a shared parameter, in a model on the meta device, a parameter of its own."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        module._parameters[leaf] = nn.Parameter(module.get_parameter(leaf).detach().clone(), requires_grad=False)


def _check_shapes(folder: Path, model: nn.Module, tensors: ShardedTensors, keys: Mapping[str, str]) -> None:
    described = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    outline = tensors.outline()
    wrong = next((name for name, key in keys.items() if outline[key].shape != described[name].shape), None)
    if wrong is not None:
        raise FormatError(
            f"'{folder}' holds '{keys[wrong]}' of shape {tuple(outline[keys[wrong]].shape)}, where its {CONFIG} says "
            f"{tuple(described[wrong].shape)}",
            next_step="give the configuration that the weights were saved with",
            code="corrupt_file",
        )


def _take_dtypes(model: nn.Module, tensors: ShardedTensors, keys: Mapping[str, str]) -> None:
    """Give a model on the meta device the dtypes of its stored tensors."""
    outline = tensors.outline()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in keys:
            parameter.data = outline[keys[name]]
