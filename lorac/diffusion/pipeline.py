"""Pipelines whose models are compiled: diffusers' methods about adapters act on the compiled models."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from lorac.context_values import run_with_value
from lorac.diffusion.parts import PipelinePart
from lorac.diffusion.running_call import Adapters, RunningCall, hold_adapters
from lorac.errors import ChoiceError, OptionError, Unavailable
from lorac.ir.slots.choice import UNSET, Choice
from lorac.session.compiled import Compiled
from lorac.session.other_vocabularies import COMPUTING_STEPS, LORAC_STEPS
from lorac.storage.remote import parse_name

_STRENGTH = re.compile("lora_scale|.*attention_kwargs")
"""Arguments in which diffusers takes the strength of LoRAs."""
_MAKING = re.compile("(from|load_lora|save_lora)_")
"""Methods of classes that make pipelines, or load or write a model's LoRA."""
_LORA_LOADERS = "diffusers.loaders.lora"
"""Where diffusers' methods about LoRAs are."""
_EARLIER = "call it on the original pipeline, then compile that"


class Pipeline(Protocol):
    """A pipeline of diffusers."""

    @property
    def components(self) -> Mapping[str, object]:
        """Its models, tokenizers and scheduler by name."""


class CompiledPipeline:
    """The part of a compiled pipeline's class that comes before the pipeline's own class.

    ``load_lora_weights``, ``set_adapters`` and the like act on the compiled models, as ``compiled.add_adapter`` and
    ``compiled.swap`` do; those that would change a model are refused, with the function of lorac that does the same.

    Attributes:
        compiled: the models and their adapters, to swap, explain and save.
        running_call: the adapters of the call that is running, which the models read.
    """

    compiled: Compiled
    running_call: ContextVar[RunningCall | None]
    _disabled: Choice = ()

    def __call__(self, *args: Any, adapters: Adapters = UNSET, **kwargs: Any) -> Any:
        """Make images as the pipeline's own class does, with its arguments.

        Args:
            *args, **kwargs: those of the pipeline. A ``scale`` in ``cross_attention_kwargs`` multiplies the strengths
                of all adapters for this call.
            adapters: a choice for this call, or a list with one per prompt; default: the active one. A swap meanwhile
                takes effect in the next call.
        """
        call = super().__call__  # type: ignore[misc]  # the pipeline's
        bound = inspect.signature(call).bind(*args, **kwargs)
        images = next((n for name, n in bound.arguments.items() if re.fullmatch(r"num_\w+_per_prompt", name)), None)
        with hold_adapters(self.compiled, adapters, self._take_strength(bound), int(images or 1)) as running:
            return run_with_value(self.running_call, running, lambda: call(*bound.args, **bound.kwargs))

    def _take_strength(self, call: inspect.BoundArguments) -> Any:
        """Take the strength of LoRAs out of the arguments of a call; 1 where there is none."""
        scale: Any = None
        for name, value in list(call.arguments.items()):
            if name == "lora_scale":
                scale = call.arguments.pop(name)
            elif _STRENGTH.fullmatch(name) and isinstance(value, Mapping) and "scale" in value:
                rest = dict(value)
                scale, call.arguments[name] = rest.pop("scale"), rest or None
        if scale is None:
            return 1.0
        self._lora_scale = scale
        return scale

    def load_lora_weights(
        self,
        source: str | Path,
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        hotswap: bool = False,
        **options: object,
    ) -> None:
        """Add an adapter from a file or folder and make it the active one, without a rebuild.

        Args:
            source: the file, or the folder that holds it, by its path or name; of any format that
                ``lorac.load_adapter`` reads.
            adapter_name: default: the file's.
            weight_name: the file in the folder.
            subfolder: the folder in the source that holds it.
            revision: of a name on the hub; a path has none.
            hotswap: replace the adapter of that name, which stays if the file is refused.
            **options: diffusers' options of downloads, which have no effect.

        Raises:
            NeedsRecompile: it needs more sites or rank than were reserved; the message says which ``reserve=`` admits
                it.
            OptionError: the source is neither a file nor a folder.
        """
        if not isinstance(source, str | Path):
            raise OptionError(
                f"load_lora_weights takes a file or a folder, not a {type(source).__name__}",
                next_step="write the tensors with safetensors.torch.save_file, and give the file",
            )
        path = Path(source, *filter(None, (subfolder, weight_name)))
        if revision is not None and parse_name(path) is not None:
            path = Path(f"{path}@{revision}")
        if hotswap and adapter_name in self.compiled.adapters:
            old, active = self.compiled.adapters[adapter_name], self.compiled.choice
            self.compiled.remove_adapter(adapter_name)
            try:
                self.compiled.add_adapter(path, adapter_name)
            except BaseException:
                self.compiled.add_adapter(old, adapter_name)
                self.compiled.swap(dict(active))
                raise
        else:
            adapter_name = self.compiled.add_adapter(path, adapter_name)
        self.compiled.swap(adapter_name)

    def unload_lora_weights(self) -> None:
        """Remove every adapter."""
        self.delete_adapters(list(self.compiled.adapters))

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove adapters by their names."""
        for name in _as_list(adapter_names):
            self.compiled.remove_adapter(name)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Activate adapters with strengths, as ``compiled.swap({name: strength})`` does.

        Raises:
            AdapterNotFound: there is no such adapter.
            ChoiceError: the numbers of names and strengths differ, or a strength is one per model or per block.
        """
        names = _as_list(adapter_names)
        each = adapter_weights if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        if len(each) != len(names):
            raise ChoiceError(
                f"{len(each)} strengths for {len(names)} adapters", next_step="give one strength, or one per adapter"
            )
        for name, weight in zip(names, each, strict=True):
            if isinstance(weight, Mapping):
                raise ChoiceError(
                    f"'{name}' is given a strength for each model, and an adapter has one for all",
                    next_step="give one strength; a model with another strength needs an adapter of its own",
                )
        self.compiled.swap({name: 1.0 if w is None else w for name, w in zip(names, each, strict=True)})

    def get_active_adapters(self) -> list[str]:
        """Return the names of the active adapters."""
        return list(self.compiled.active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return model -> the names of the adapters that act on it."""
        found: dict[str, list[str]] = {}
        for name, adapter in self.compiled.adapters.items():
            for part in dict.fromkeys(path.partition(".")[0] for path in (*adapter.tensors, *adapter.replaced)):
                found.setdefault(part, []).append(name)
        return found

    def disable_lora(self) -> None:
        """Deactivate every adapter, as ``compiled.swap(None)`` does."""
        self._disabled = self.compiled.choice or self._disabled
        self.compiled.swap(None)

    def enable_lora(self) -> None:
        """Activate the adapters that were active before ``disable_lora``."""
        if not self.compiled.choice:
            self.compiled.swap(dict(self._disabled))

    @property
    def fused_loras(self) -> set[str]:
        """The names of the adapters that are merged into weights at present."""
        return set() if self.compiled.mode == "live" else set(self.compiled.active)

    @property
    def num_fused_loras(self) -> int:
        """The number of adapters that are merged into weights at present."""
        return len(self.fused_loras)

    def save_pretrained(self, *args: object, **kwargs: object) -> NoReturn:
        """Raise ``Unavailable``: a compiled pipeline is written in two parts."""
        raise Unavailable(
            "a compiled pipeline cannot be saved in the form that diffusers reads",
            next_step="save pipeline.compiled by its save(folder), and put the loaded models into a pipeline by "
            "lorac.diffusion.place_parts; or save the original pipeline",
        )

    def to(self, *args: object, **kwargs: object) -> CompiledPipeline:
        """Move the models that are not compiled.

        Raises:
            Unavailable: another dtype or device than that of the compiled models.
        """
        for part in vars(self).values():
            if isinstance(part, PipelinePart):
                part.to(*args, **kwargs)
        super().to(*args, **kwargs)  # type: ignore[misc]  # the pipeline's
        return self

    if TYPE_CHECKING:  # the attributes of the pipeline's own class

        def __getattr__(self, name: str) -> Any: ...


@functools.cache
def make_pipeline_class(cls: type) -> type[CompiledPipeline]:
    """Make a pipeline class's compiled subclass; diffusers finds pipelines of other tasks by its name, which it keeps.

    Methods that work on models of diffusers are refused, and those that take the strength of LoRAs hold the adapters
    at that strength.
    """
    steps = {**LORAC_STEPS, **COMPUTING_STEPS}
    members: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": f"Compiled{cls.__name__}",
        "__doc__": cls.__doc__,
    }
    for name in dir(cls):
        member = inspect.getattr_static(cls, name)
        owner = next(base for base in cls.__mro__ if name in vars(base))
        if isinstance(member, classmethod):
            refused = _MAKING.match(name) is not None
        elif hasattr(CompiledPipeline, name) or not inspect.isfunction(member):
            continue
        else:
            refused = name in steps or (name[0] != "_" and owner.__module__.startswith(_LORA_LOADERS))
            if not refused and any(map(_STRENGTH.fullmatch, inspect.signature(member).parameters)):
                members[name] = _take_strengths(member)
        if refused:
            members[name] = _refuse_method(name, steps.get(name, _EARLIER))
    return type(cls.__name__, (CompiledPipeline, cls), members)


def _take_strengths(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of pipelines that holds the adapters at the strength that it is given."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def method(self: CompiledPipeline, *args: object, **kwargs: object) -> Any:
        bound, running = signature.bind(self, *args, **kwargs), self.running_call.get()
        scale = self._take_strength(bound)
        if scale == 1:
            return function(*bound.args, **bound.kwargs)
        adapters, images = (UNSET, 1) if running is None else (running.choices, running.images)
        with hold_adapters(self.compiled, adapters, scale, images) as held:
            return run_with_value(self.running_call, held, lambda: function(*bound.args, **bound.kwargs))

    return method


def _refuse_method(name: str, step: str) -> Callable[..., NoReturn]:
    def method(self: CompiledPipeline, *args: object, **kwargs: object) -> NoReturn:
        raise Unavailable(
            f"'{name}' is for models of diffusers, and the models of this pipeline are compiled", next_step=step
        )

    method.__name__, method.__doc__ = name, f"Raise ``Unavailable``: {step}."
    return method


def _as_list(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
