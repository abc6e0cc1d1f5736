"""Several models as one host: an adapter may span them, and one swap switches them all."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lorac.errors import ChoiceError, OptionError, nearest_name

MAIN_GRAPH = "main"
"""What the only graph of a single model is called."""


class Components(nn.ModuleDict):
    """Models by name; paths of sites begin with it. It is not called itself: each of them is, by its name.

    Raises:
        OptionError: a name that cannot begin a path or name a folder.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        if not models:
            raise OptionError("there is no model to compile", next_step="give one, or several by name: {'unet': model}")
        for name in models:
            if not name.isidentifier():
                raise OptionError(f"'{name}' cannot name a component", next_step="names are letters, digits and _")
        super().__init__(dict(models))


_ENCODER = ".encoder"


def get_encoder_graph_name(name: str) -> str:
    """The name of the graph of a component's encoder, where that is a graph of its own."""
    return f"{name}{_ENCODER}"


def get_graph_scope(graph: str) -> str:
    """What the paths of a graph's sites begin with: its component's name and a dot, nothing for a single model."""
    name = graph.removesuffix(_ENCODER)
    return "" if name == MAIN_GRAPH else f"{name}."


def list_components(model: nn.Module) -> dict[str, nn.Module]:
    """Graph name -> the model that is captured as that graph."""
    return dict(model.items()) if isinstance(model, Components) else {MAIN_GRAPH: model}


def get_component_prefix(model: nn.Module, name: str) -> str:
    """What the paths of a component begin with: its name and a dot, nothing for a single model."""
    return f"{name}." if isinstance(model, Components) else ""


def check_component(name: object, known: Mapping[str, object]) -> str:
    """The name, if it is that of a component.

    Raises:
        ChoiceError: there is no such component, or there are none.
    """
    if isinstance(name, str) and name in known:
        return name
    if MAIN_GRAPH in known:
        raise ChoiceError(f"a single model has no component {name!r}", next_step="call it as it is: compiled(...)")
    what = "several models were compiled together, and which to call is not said"
    raise ChoiceError(
        what if name == MAIN_GRAPH else f"{name!r} is the name of no component",
        nearest=nearest_name(str(name), known) or ", ".join(known),
        next_step=f"call one of them: compiled['{next(iter(known))}'](...)",
    )
