"""The models of a pipeline, as they are compiled, and the parts that take their places afterwards."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorac.diffusion.running_call import RunningCall
from lorac.errors import Unavailable, UnknownAttribute
from lorac.frontend.host import Host, PlainHost
from lorac.ir.calls.call import Call
from lorac.ir.slots.choice import UNSET
from lorac.session.compiled import Compiled

_LEFT = frozenset({"safety_checker", "image_encoder", "feature_extractor", "controlnet"})
"""Models of pipelines that adapters do not change."""
_HALVES = (torch.float16, torch.bfloat16)
_HIDDEN_STATES = "output_hidden_states"
_VALUES = (bool, int, float, str, list, tuple, torch.Tensor)
"""Attributes of models that pipelines read as they are, such as statistics of latents."""
_READ_BY_LAYER = frozenset({"clip_text_model", "clip"})
"""Text encoders whose inner layers' states pipelines read."""


def find_parts(components: Mapping[str, object]) -> dict[str, nn.Module]:
    """Return the models of a pipeline to compile: the denoiser, the VAE and the text encoders."""
    found = {name: part for name, part in components.items() if isinstance(part, nn.Module) and name not in _LEFT}
    return {name: model for name, model in found.items() if not isinstance(Host.of(model), PlainHost)}


def widen(model: nn.Module) -> nn.Module:
    """Copy a VAE that overflows in half precision (``force_upcast``) to float32; return other models unchanged."""
    halves = any(parameter.dtype in _HALVES for parameter in model.parameters())
    return copy.deepcopy(model).float() if upcasts(model) and halves else model


def upcasts(model: nn.Module | None) -> bool:
    """Return whether a model is a VAE that diffusers computes in float32, whatever the pipeline's dtype."""
    return bool(getattr(getattr(model, "config", None), "force_upcast", False))


def make_part_inputs(model: nn.Module) -> dict[str, object] | None:
    """Return example inputs of a text encoder that also gives the states of its layers; None for other models."""
    if getattr(getattr(model, "config", None), "model_type", None) not in _READ_BY_LAYER:
        return None
    return {**Host.of(model).example_inputs(), _HIDDEN_STATES: True}


class PipelinePart:
    """A component in its place in a pipeline; it has the component's attributes, and ``decode`` and ``encode``.

    It takes the adapters of the pipeline's running call.

    Args:
        compiled: all of the pipeline's models.
        name: the name of this one.
        running: the pipeline's call that is running.
        model: the original, if there is one.
    """

    def __init__(
        self, compiled: Compiled, name: str, running: ContextVar[RunningCall | None], model: nn.Module | None
    ) -> None:
        self.component, self._name = compiled[name], name
        self._running, self._model = running, model
        self._interface = compiled.engine.interfaces.get(name)
        self._gives_states = self._interface is not None and self._interface.constants.get(_HIDDEN_STATES) is True
        self._adaptable = any(not plan.empty for path, plan in compiled.plans.items() if path.startswith(f"{name}."))

    def __call__(self, *args: Any, adapters: Any = UNSET, **kwargs: Any) -> Any:
        """Answer as the model does, with the adapters of the pipeline's running call."""
        running = self._running.get()
        if adapters is UNSET and running is not None:
            adapters = running.choose(Call(args, kwargs).rows) if self._adaptable else running.held[0]
        wanted = kwargs.pop(_HIDDEN_STATES, None)
        states = {_HIDDEN_STATES: True} if self._gives_states else {} if wanted is None else {_HIDDEN_STATES: wanted}
        output = self.component(*args, adapters=adapters, **states, **kwargs)
        if not self._gives_states or wanted:
            return output
        if isinstance(output, tuple):
            return tuple(value for value in output if not isinstance(value, tuple))
        return type(output)(**{key: value for key, value in output.items() if key != "hidden_states"})

    def decode(self, z: Any, *args: Any, generator: object = None, **kwargs: Any) -> Any:
        """Decode latents as the VAE does; a program draws no random numbers from the generator."""
        drawn = {} if generator is None or self._interface is not None else {"generator": generator}
        return self(z.to(self.component.dtype), *args, **kwargs, **drawn)

    def encode(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Encode images as the original VAE does; adapters act on the decoder.

        Raises:
            Unavailable: there is no original.
        """
        if self._model is None:
            raise Unavailable(
                f"'{self._name}' was compiled to decode, and there is no model that encodes",
                next_step="give the pipeline its own VAE before the compiled models are placed in it",
            )
        return self._model.encode(x, *args, **kwargs)  # type: ignore[operator]  # a method of VAEs

    def to(self, *args: Any, **kwargs: Any) -> "PipelinePart":
        """Return the part, which keeps its device and dtype; a VAE stays in float32 whatever dtype is wanted.

        Raises:
            Unavailable: another dtype or device.
        """
        if upcasts(self._model) and self.component.dtype == torch.float32:
            args = tuple(value for value in args if not isinstance(value, torch.dtype))
            kwargs.pop("dtype", None)
        self.component.to(*args, **kwargs)
        return self

    @contextmanager
    def cache_context(self, name: str, **kwargs: object) -> Iterator[None]:
        """Do nothing around a block of calls: a compiled transformer keeps no cache between steps."""
        yield

    def __repr__(self) -> str:
        return repr(self.component)

    if not TYPE_CHECKING:  # a type checker would take every attribute to exist

        def __getattribute__(self, name: str) -> Any:
            # diffusers asks for that of whatever a pipeline is made of: in another one, nothing would set adapters
            return self.__getattr__(name) if name == "__module__" else super().__getattribute__(name)

        def __getattr__(self, name: str) -> Any:
            if name == "__module__":
                raise UnknownAttribute(
                    f"'{self._name}' is compiled, and works in only one pipeline",
                    next_step="make the other pipeline of the original models, and place the compiled ones there: "
                    "lorac.diffusion.place_parts(other, pipeline.compiled)",
                )
            if name.startswith("__"):  # Python itself asks for those
                raise AttributeError(name)
            own = getattr(self._model, name, None)
            if isinstance(own, _VALUES) or (isinstance(own, nn.Module) and next(own.parameters(), None) is None):
                return own  # no adapter changes those
            return getattr(self.component, name)
