"""A model in a folder: its structure is on the meta device, and its tensors are read one at a time."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lorac.argument_types import JsonMapping
from lorac.errors import list_some, unmergeable_error, warn
from lorac.formats.reading import corrupt_error
from lorac.frontend.checkpoint_names import ConvertedTensors, find_stored_names
from lorac.frontend.model_view import ModelView
from lorac.merging.dequantised_tensors import DequantisedTensors
from lorac.session.model_folders import CONFIG, outline_model, read_model_config
from lorac.storage.sharded_tensors import ShardedTensors

_MANY_LAYERS = 1000
"""Most layers that are built without a check of the number of stored tensors, since weights may be shared."""
Stored = ShardedTensors | DequantisedTensors


@dataclass(frozen=True, eq=False)
class StoredModel:
    """A model in a folder.

    Attributes:
        folder: the path of the folder.
        config: the contents of its configuration.
        tensors: the model's tensors by stored name.
        keys: name in the model -> stored name. A tied weight has an entry for each name that is stored.
        converted: name in the model -> the stored tensors from which it is computed, such as a stack of experts.
        view: the model on the meta device, with its stored tensors.
    """

    folder: Path
    config: JsonMapping
    tensors: Stored
    keys: Mapping[str, str]
    converted: Mapping[str, ConvertedTensors]
    view: ModelView

    @classmethod
    def open(cls, folder: Path, *, dequantize: bool | None = None) -> "StoredModel":
        """Open a folder that transformers or diffusers wrote.

        Args:
            folder: the path of the folder.
            dequantize: whether to read the float values of quantised weights; None if the caller has no such option.

        Raises:
            OptionError: the configuration is missing, or no model can be built from it.
            FormatError: the weights are missing, damaged, of other shapes, or not in safetensors files.
            CompileError: the weights are quantised and ``dequantize`` is not True, or their layout is unknown.
        """
        config = read_model_config(folder)
        settings = config.get("quantization_config")
        if settings and not dequantize:
            raise unmergeable_error(
                f"'{folder}' holds a quantised model, whose weights lorac can neither change nor compare",
                next_step="give the model as it was before"
                + ("" if dequantize is None else ", or dequantize=True to merge into its float values"),
            )
        as_stored = ShardedTensors(folder)
        tensors: Stored = DequantisedTensors(as_stored, folder, settings) if settings else as_stored
        if settings:
            config = {name: value for name, value in config.items() if name != "quantization_config"}
        _check_depth(folder, config, max(_MANY_LAYERS, len(as_stored)))
        model = outline_model(folder)
        keys, groups = find_stored_names(model, tensors)
        stored = tensors.outline()
        outline = {name: stored[key] for name, key in keys.items()}
        converted: dict[str, ConvertedTensors] = {}
        for group in groups:  # tensors of the model that are computed from several stored ones
            try:
                loaded = group.load(stored)
            except (RuntimeError, ValueError, LookupError) as error:
                raise corrupt_error(
                    f"'{folder}': '{group.name}' cannot be made of '{next(iter(group.sources))}' and others: "
                    f"{str(error).partition(chr(10))[0]}",
                    next_step="download the whole folder again",
                ) from error
            outline |= loaded
            converted |= dict.fromkeys(loaded, group)
        _check_shapes(folder, model, outline)
        for names in find_ties(model):
            first, *others = [name for name in names if name in keys] or names
            if any(not torch.equal(tensors[keys[first]], tensors[keys[name]]) for name in others if name in keys):
                separate_names(model, others)  # as transformers does where they are stored with different values
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.data = outline.get(name, parameter)
        reads = dict(keys)
        for names in find_ties(model):
            key = next((keys[name] for name in names if name in keys), None)
            reads |= {} if key is None else {name: key for name in names if name not in keys}
        return cls(
            folder,
            config,
            tensors,
            keys,
            converted,
            dataclasses.replace(ModelView.of(model), stored=LoadedTensors(tensors, reads, converted)),
        )


class LoadedTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by their names in the model; each is read or computed on access.

    Args:
        tensors: tensors by stored name.
        names: name in the model -> stored name.
        converted: name in the model -> the tensors from which it is computed.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], names: Mapping[str, str], converted: Mapping[str, ConvertedTensors]
    ) -> None:
        self._tensors, self._names, self._converted = tensors, names, converted

    def __getitem__(self, name: str) -> Tensor:
        if name in self._names:
            return self._tensors[self._names[name]]
        return self._converted[name].load(self._tensors)[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._names
        yield from self._converted

    def __len__(self) -> int:
        return len(self._names) + len(self._converted)


def separate_names(model: nn.Module, names: Iterable[str]) -> None:
    """Untie these names of a shared parameter in a model on the meta device: each gets a separate parameter."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        module._parameters[leaf] = nn.Parameter(module.get_parameter(leaf).detach().clone(), requires_grad=False)


def _check_depth(folder: Path, config: JsonMapping, most: int) -> None:
    """Refuse a number of layers that the weights cannot have, before that many layers are built."""
    for name, value in config.items():
        if isinstance(value, dict):
            _check_depth(folder, value, most)
        elif type(value) is int and value > most and ("layer" in name or "depth" in name):
            raise corrupt_error(
                f"'{folder / CONFIG}' says {name}={value}, more than its weights allow",
                next_step="give the configuration that the weights were saved with",
            )


def _check_shapes(folder: Path, model: nn.Module, outline: Mapping[str, Tensor]) -> None:
    described = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    wrong = next((name for name in outline if name in described and outline[name].shape != described[name].shape), None)
    if wrong is not None:
        raise corrupt_error(
            f"'{folder}' holds '{wrong}' of shape {tuple(outline[wrong].shape)}, where its {CONFIG} says "
            f"{tuple(described[wrong].shape)}",
            next_step="give the configuration that the weights were saved with",
        )
    whole = (name for name in outline if name in described and described[name].is_floating_point())
    wrong = next((name for name in whole if not outline[name].is_floating_point()), None)
    if wrong is not None:
        raise corrupt_error(
            f"'{folder}' holds '{wrong}' in {outline[wrong].dtype}, which is not a dtype of trained weights",
            next_step="give the model as it was before quantisation",
        )


def find_ties(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several names in a model."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [group for group in names.values() if len(group) > 1]


def find_kept_ties(model: nn.Module, merged: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Yield the names of each shared parameter that stays shared, since the merged values are equal under all names.

    A warning names the parameters that are changed and untied.

    Args:
        model: the model before merging.
        merged: name -> merged tensor.
    """
    for names in find_ties(model):
        changed = [name for name in names if name in merged]
        if len(changed) == len(names) and all(torch.equal(merged[names[0]], merged[name]) for name in names[1:]):
            yield names
        elif changed:
            warn(
                f"{list_some(names)} were one tensor, and are several now, since the adapters change "
                f"{list_some(changed)} {'differently' if len(changed) == len(names) else 'alone'}",
                next_step="a checkpoint of the merged model stores each of them",
            )
