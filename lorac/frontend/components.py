"""Roots of compiled models: several models as one host, which adapters may span, and the skeleton of a model."""

from collections.abc import Mapping

from torch import Tensor, nn

from lorac.argument_types import check_type
from lorac.errors import ChoiceError, CompileError, OptionError, nearest_name

MAIN_GRAPH = "main"
"""Name of the only graph of a single model."""
_ENCODER = ".encoder"


class Components(nn.ModuleDict):
    """Models by name; the name is the prefix of the model's site paths, and calls select a model by name.

    Raises:
        OptionError: there is no model, or a name is not valid in a path or as a folder.
        WrongType: a model is not a module.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        if not models:
            raise OptionError("there is no model to compile", next_step="give one, or several by name: {'unet': model}")
        for name, model in models.items():
            if not name.isidentifier():
                raise OptionError(f"'{name}' cannot name a component", next_step="use letters, digits and _ in names")
            check_type(model, nn.Module, f"the model '{name}'", next_step="give an nn.Module that is loaded")
        super().__init__({name: strip_wrappers(model) for name, model in models.items()})


class Skeleton(nn.Module):
    """The root of a skeleton, with a transformers model's methods for embeddings.

    Args:
        embeddings: ``"input"`` or ``"output"`` -> path of the module.
        several: whether its children are separate models that are compiled together.
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
"""torch's wrapper classes whose forward only calls another module -> the attribute with that module."""
_DISTRIBUTED = {
    "DistributedDataParallel": "give what it wraps, model.module, and wrap what compile() returns",
    "FullyShardedDataParallel": "compile the model before it is sharded, and train it in a DistributedDataParallel",
    "FSDPModule": "compile the model before it is sharded, and train it in a DistributedDataParallel",
}
"""torch's classes of models that several processes share -> the next step."""


def strip_wrappers(model: nn.Module) -> nn.Module:
    """Return the model inside torch's wrappers that only forward calls, such as ``torch.compile``'s.

    Raises:
        CompileError: several processes share the model.
    """
    names = {cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("torch.")}
    for name in names & _DISTRIBUTED.keys():
        raise CompileError(f"the model is a {name}, which several processes share", next_step=_DISTRIBUTED[name])
    if isinstance(model, nn.Module) and any(map(is_in_parts, model.parameters())):
        what = "the model's weights lie in parts in several processes"
        raise CompileError(what, next_step="compile within lorac.training.gather_base(compiled)")
    inner = next((getattr(model, _WRAPPERS[name]) for name in names & _WRAPPERS.keys()), None)
    return model if inner is None else strip_wrappers(inner)


def is_in_parts(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, of which each process has a part."""
    return hasattr(tensor, "full_tensor")


def get_encoder_graph_name(name: str) -> str:
    """Return the graph name for a component's encoder, if the encoder is a separate graph."""
    return f"{name}{_ENCODER}"


def get_graph_scope(graph: str) -> str:
    """Return the prefix of a graph's site paths: its component's name and a dot, "" for a single model."""
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
    """Check a component's name and return it.

    Raises:
        ChoiceError: there is no component with this name, or the model has no components.
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
