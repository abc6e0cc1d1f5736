"""Running a host to see what it answers: on a copy, with the random state of the process kept."""

from __future__ import annotations

import functools
import pickle
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lorac.frontend.copying import copy_structure
from lorac.frontend.hugging_face import set_config_fields

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ModelRun:
    """One run of a host.

    Attributes:
        output: what it answered.
        drew: whether it drew random numbers.
    """

    output: Any
    drew: bool


class WeightWritten(Exception):
    """A host was about to write into one of its weights.

    Args:
        name: the weight's.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"forward writes into '{name}'")
        self.name = name


class ModelRunner:
    """A copy of a host, in eval mode, that is run in its place: buffers of its own over the host's weights.

    Args:
        host: left as it was, even where its forward writes.
    """

    def __init__(self, host: nn.Module) -> None:
        self._buffers = dict(host.named_buffers())
        self._copy = copy_structure(host).eval()
        set_config_fields(self._copy)
        self._weights = {
            place: name
            for name, tensor in _iter_shared_tensors(self._copy)
            if (place := _get_storage_address(tensor)) is not None
        }

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], seed: int) -> ModelRun:
        """One forward; what earlier ones left in the copy's buffers and attributes is still there.

        Args:
            args, kwargs: as forward takes them.
            seed: what random numbers are drawn from.

        Raises:
            WritesWeight: forward writes into a weight, which was not done.
        """
        watch = _WeightWriteDetector(self._weights)
        with torch.no_grad(), seed_random_numbers(self._copy, seed) as drew:
            try:
                output = self._guarded(watch, args, kwargs)
            finally:
                watch.tell()  # also where the model caught the error and went on, or raised one of its own for it
            return ModelRun(output, drew())

    def _guarded(self, watch: _WeightWriteDetector, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        with watch:
            return self._copy(*args, **kwargs)

    def changed(self) -> list[str]:
        """The buffers that runs have changed."""
        own = dict(self._copy.named_buffers())
        return [name for name, buffer in self._buffers.items() if name not in own or not _same(own[name], buffer)]


@contextmanager
def seed_random_numbers(model: nn.Module, seed: int) -> Iterator[Callable[[], bool]]:
    """Random numbers are drawn from a seed inside the block, and leave no trace; gives whether any were drawn so far.

    Args:
        model: as ``random_state_kept``'s.
        seed: what all but the model's own generators draw from.
    """
    devices = _devices(model)
    with preserve_random_state(model):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = _get_random_states(devices)
        yield lambda: before != _get_random_states(devices)


def _get_random_states(devices: Collection[torch.device]) -> list[bytes]:
    """The random states of torch, NumPy and Python, to compare with."""
    drawn = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
    others = (pickle.dumps(np.random.get_state()), pickle.dumps(random.getstate()))
    return [*(state.numpy().tobytes() for state in drawn), *others]


@contextmanager
def preserve_random_state(model: nn.Module) -> Iterator[None]:
    """Drawing random numbers inside the block, by torch, NumPy, Python or generators of the model, leaves no trace.

    Args:
        model: the devices that it lies on are those whose states are kept.
    """
    generators = [value for module in model.modules() for value in vars(module).values() if _is_generator(value)]
    states = [generator.get_state() for generator in generators]
    numbers, python = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=_devices(model)):
            yield
    finally:
        np.random.set_state(numbers)
        random.setstate(python)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


class _WeightWriteDetector(TorchDispatchMode):
    """Refuses ops that write into weights before they do.

    Args:
        weights: where a weight lies -> its name.
    """

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._weights = weights
        self._name: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if not _find_written_arguments(func):  # of most ops nothing is to be looked at
            return func(*args, **given)
        places = (_get_storage_address(tensor) or 0 for tensor in _find_written_tensors(func, args, given))
        names = [self._weights[place] for place in places if place in self._weights]
        if names:
            self._name = self._name or names[0]
            self.tell()
        return func(*args, **given)

    def tell(self) -> None:
        """Raise ``WeightWritten`` if an op was refused."""
        if self._name is not None:
            raise WeightWritten(self._name)


def _find_written_tensors(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that a call of an op writes into."""
    places = _find_written_arguments(func)
    values = [kwargs[name] if name in kwargs else args[i] for i, name in places if name in kwargs or i < len(args)]
    flat = [part for value in values for part in (value if isinstance(value, list | tuple) else (value,))]
    return [value for value in flat if isinstance(value, Tensor)]


@functools.lru_cache(maxsize=4096)
def _find_written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments that an op writes into."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _iter_shared_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a copy shares with its host: parameters, and tensors that are plain attributes."""
    yield from model.named_parameters()
    for path, module in model.named_modules():
        held = ((name, value) for name, value in vars(module).items() if isinstance(value, Tensor))
        yield from ((f"{path}.{name}" if path else name, value) for name, value in held)


def _get_storage_address(tensor: Tensor) -> int | None:
    """Where a tensor's storage lies; None where it has none, as on the meta device."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):  # a subclass that holds its values elsewhere
        return None


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _devices(model: nn.Module) -> list[torch.device]:
    """The devices other than the CPU that draw random numbers for a model."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters() if parameter.is_cuda))


def _is_generator(value: object) -> bool:
    return torch.Generator in type(value).__mro__  # torch has isinstance run Python code for each value asked of


FUSED_LAYERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""Layers of torch that in evaluation call one fused kernel, which bypasses the layers inside them."""


class NoFastPath(TorchFunctionMode):
    """Does nothing; but torch fuses no layer whose calls somebody watches, in this thread alone."""

    def __torch_function__(
        self, func: Callable[..., T], types: object, args: tuple[object, ...] = (), kwargs: Any = None
    ) -> T:
        return func(*args, **(kwargs or {}))


def disable_fast_path(model: nn.Module) -> AbstractContextManager[object]:
    """Return a context in which torch calls the layers inside a model's transformer layers."""
    fuses = any(isinstance(module, FUSED_LAYERS) for module in model.modules())
    return NoFastPath() if fuses else nullcontext()
