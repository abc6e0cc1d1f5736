"""One of several models that were compiled together."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch
from torch import nn

from lorac.errors import Unavailable
from lorac.frontend.components import get_graph_scope
from lorac.frontend.skeleton import build_skeleton
from lorac.ir.calls.call import Call
from lorac.ir.slots.choice import UNSET
from lorac.runtime.traits import ModelTraits
from lorac.session.presentation import unknown_attribute
from lorac.session.session import Session
from lorac.target.engine import Engine


class ComponentHost(Protocol):
    """The attributes of a compiled model that its components use."""

    engine: Engine
    session: Session

    def call(self, graph: str, call: Call, adapters: Any) -> Any:
        """Run a graph once."""

    def generate(self, inputs: Any, **options: Any) -> Any:
        """Continue prompts."""


class Component:
    """One of several models that were compiled together, a replacement of the original.

    Call it like the model. It has the model's ``config``, ``dtype`` and ``device``, so that a pipeline accepts it, and
    its modules by name, for inspection. ``adapters=`` in a call chooses adapters for that call only.

    Args:
        compiled: all compiled models together.
        name: the name of this model.
        traits: configuration, dtype and device of the original.
    """

    def __init__(self, compiled: ComponentHost, name: str, traits: ModelTraits) -> None:
        self._compiled, self._name = compiled, name
        self.config, self.dtype, self.device = traits.config, traits.dtype, traits.device

    def __call__(self, *args: Any, adapters: Any = UNSET, **kwargs: Any) -> Any:
        """Call the model. Outputs have the model's own output type."""
        return self._compiled.call(self._name, Call(args, kwargs), adapters)

    def generate(self, inputs: Any = None, **options: Any) -> Any:
        """Continue prompts as ``Compiled.generate`` does."""
        return self._compiled.generate(inputs, component=self._name, **options)

    def to(self, *args: object, **kwargs: object) -> Component:
        """Return the component, which keeps its dtype and device.

        Raises:
            Unavailable: another dtype or device is requested.
        """
        for asked in (*args, *kwargs.values()):
            is_device = isinstance(asked, str | torch.device)
            own = self.device.type if is_device else self.dtype
            wanted = torch.device(asked).type if isinstance(asked, str | torch.device) else asked
            if (is_device or isinstance(asked, torch.dtype)) and wanted != own:
                raise Unavailable(
                    f"'{self._name}' was compiled for {own}, and stays there",
                    next_step="compile the model again with dtype= or device=",
                )
        return self

    def modules(self) -> Iterator[nn.Module]:
        """Iterate over the model's modules; the modules of an emitted program have shapes, but no forward."""
        return self._structure.modules()

    @functools.cached_property
    def _structure(self) -> nn.Module:
        root = self._compiled.engine.module
        if root is None:
            root = build_skeleton(self._compiled.session.host.skeleton)
            for module in root.modules():
                module.register_forward_pre_hook(_refuse_part)
        return root.get_submodule(get_graph_scope(self._name).removesuffix("."))

    def __repr__(self) -> str:
        return f"<component {self._name} of {self._compiled!r}>"

    if not TYPE_CHECKING:  # a type checker would assume that every attribute exists

        def __getattr__(self, name: str) -> nn.Module:
            children = {} if name.startswith("_") else dict(self._structure.named_children())
            if name not in children:
                raise unknown_attribute(self, name)
            return children[name]


def _refuse_part(module: nn.Module, _: object) -> NoReturn:
    raise Unavailable(
        f"a {type(module).__name__} of an emitted program cannot be called: only the whole component can",
        next_step="call compiled[name](...), or compile with target='eager', whose modules can be called alone",
    )
