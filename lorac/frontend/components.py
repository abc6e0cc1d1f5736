"""Roots of compiled models: several models as one host, whose adapters may span them, and the skeleton of a model."""

from collections.abc import Mapping

from torch import Tensor, nn

from lorac.argument_types import check_type
from lorac.errors import ChoiceError, CompileError, OptionError, nearest_name

MAIN_GRAPH = "main"
"""Name of the only graph of a single model."""
_ENCODER = ".encoder"


class Components(nn.ModuleDict):
    """Models by name. Paths of their sites begin with the name, and each model is called by its name.

    Raises:
        OptionError: there is no model, or a name cannot begin a path or name a folder.
        WrongType: one of them is not a module.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        if not models:
            raise OptionError("there is no model to compile", next_step="give one, or several by name: {'unet': model}")
        for name, model in models.items():
            if not name.isidentifier():
                raise OptionError(f"'{name}' cannot name a component", next_step="names are letters, digits and _")
            check_type(model, nn.Module, f"the model '{name}'", next_step="give an nn.Module that is loaded")
        super().__init__({name: strip_wrappers(model) for name, model in models.items()})


class Skeleton(nn.Module):
    """The root of a skeleton; returns the embeddings as a transformers model does.

    Args:
        embeddings: which one -> its path.
        several: whether its children are models of their own, compiled together.
    """

    def __init__(self, embeddings: Mapping[str, str], *, several: bool = False) -> None:
        super().__init__()
        self._embeddings, self.several = dict(embeddings), several

    def get_input_embeddings(self) -> nn.Module | None:
        """Return the module that embeds the input, or None."""
        return self._embedding("input")

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output layer, or None."""
        return self._embedding("output")

    def _embedding(self, role: str) -> nn.Module | None:
        path = self._embeddings.get(role)
        return None if path is None else self.get_submodule(path)


_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "AveragedModel": "module"}
"""torch's classes whose forward passes a call on to another module -> their name for it."""
_DISTRIBUTED = {
    "DistributedDataParallel": "give what it wraps, model.module, and wrap what compile() returns",
    "FullyShardedDataParallel": "compile the model before it is sharded, and train it in a DistributedDataParallel",
    "FSDPModule": "compile the model before it is sharded, and train it in a DistributedDataParallel",
}
"""torch's classes of models that several processes share -> what to give instead."""


def strip_wrappers(model: nn.Module) -> nn.Module:
    """Return the model inside torch's wrappers that only pass calls on, such as that of ``torch.compile``.

    Raises:
        CompileError: several processes share the model.
    """
    names = {cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("torch.")}
    for name in names & _DISTRIBUTED.keys():
        raise CompileError(f"the model is a {name}, which several processes share", next_step=_DISTRIBUTED[name])
    if isinstance(model, nn.Module) and any(map(is_in_parts, model.parameters())):
        what = "the model's weights lie in parts in several processes"
        raise CompileError(what, next_step="within lorac.training.gather_base(compiled) it has whole ones")
    inner = next((getattr(model, _WRAPPERS[name]) for name in names & _WRAPPERS.keys()), None)
    return model if inner is None else strip_wrappers(inner)


def is_in_parts(tensor: Tensor) -> bool:
    """Return whether each of several processes holds a part of a tensor: whether it is torch's DTensor."""
    return hasattr(tensor, "full_tensor")


def get_encoder_graph_name(name: str) -> str:
    """Return the name of the graph of a component's encoder, where that is a separate graph."""
    return f"{name}{_ENCODER}"


def get_graph_scope(graph: str) -> str:
    """Return the prefix of the paths of a graph's sites: its component's name and a dot, "" for a single model."""
    name = graph.removesuffix(_ENCODER)
    return "" if name == MAIN_GRAPH else f"{name}."


def list_components(model: nn.Module) -> dict[str, nn.Module]:
    """Return graph name -> the model that is captured as that graph."""
    return dict(model.named_children()) if _is_several(model) else {MAIN_GRAPH: model}


def get_component_prefix(model: nn.Module, name: str) -> str:
    """Return the prefix of a component's paths: its name and a dot, "" for a single model."""
    return f"{name}." if _is_several(model) else ""


def _is_several(model: nn.Module) -> bool:
    return isinstance(model, Components) or (isinstance(model, Skeleton) and model.several)


def check_component(name: object, known: Mapping[str, object]) -> str:
    """Return the name of a component.

    Raises:
        ChoiceError: there is no component of that name, or a single model has none.
    """
    if isinstance(name, str) and name in known:
        return name
    if MAIN_GRAPH in known:
        raise ChoiceError(f"a single model has no component {name!r}", next_step="call it directly: compiled(...)")
    what = "several models were compiled together, and the call names none of them"
    raise ChoiceError(
        what if name == MAIN_GRAPH else f"{name!r} is not the name of a component",
        nearest=nearest_name(str(name), known) or ", ".join(known),
        next_step=f"call one of them: compiled['{next(iter(known))}'](...)",
    )
