"""Runs of a copy of a model that preserve the global random states."""

import pickle
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lorac.errors import BaseNeeded
from lorac.frontend.host import Host
from lorac.ir.calls.call import CAPTURE_CONFIG, Call
from lorac.ir.traces.functions import find_written_tensors
from lorac.ir.traces.modes import DispatchMode

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ModelRun:
    """One run of a model.

    Attributes:
        drew: whether forward drew random numbers.
    """

    output: object
    drew: bool


class WeightWritten(Exception):
    """An error for a forward that is about to write into one of its weights.

    Args:
        name: the weight's name.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"forward writes into '{name}'")
        self.name = name


class ModelRunner:
    """A runner of a copy of a model in eval mode; the copy has separate buffers over the model's weights.

    Args:
        host: the model; it is not changed, even if its forward writes.
    """

    def __init__(self, host: nn.Module) -> None:
        self._buffers = dict(host.named_buffers())
        self._copy = Host.of(host).copy().configure(CAPTURE_CONFIG).model.eval()
        shared = list[tuple[str, Tensor]](self._copy.named_parameters())
        for path, module in self._copy.named_modules():  # plain attributes may be tensors
            tensors = [(name, value) for name, value in vars(module).items() if isinstance(value, Tensor)]
            shared += [(f"{path}.{name}" if path else name, value) for name, value in tensors]
        addresses = [(_get_storage_address(tensor), name) for name, tensor in shared]
        self._weights = {address: name for address, name in addresses if address is not None}

    def run(self, call: Call, seed: int = 0) -> ModelRun:
        """Run forward once. Changes of earlier runs to the copy's buffers and attributes persist.

        Args:
            call: arguments as forward takes them; they are not changed.
            seed: seed of random numbers.

        Raises:
            WeightWritten: forward would write into a weight; the write is not executed.
        """
        detector = _WeightWriteDetector(self._weights)
        with torch.no_grad(), seed_random_numbers(self._copy, seed) as drew:
            try:
                own_args, own_kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (call.args, dict(call.kwargs)))
                with detector:
                    output = self._copy(*own_args, **own_kwargs)
            finally:
                detector.raise_if_refused()  # even if the model caught the error, or raised another error for it
            return ModelRun(output, drew())

    def changed(self) -> list[str]:
        """Return the names of the buffers that runs have changed."""
        current = dict(self._copy.named_buffers())
        found = ((name, buffer, current.get(name)) for name, buffer in self._buffers.items())
        return [
            name
            for name, before, now in found
            if now is None or now.shape != before.shape or now.dtype != before.dtype or not torch.equal(now, before)
        ]


def check_runs(model: nn.Module) -> None:
    """Refuse a model without values, such as one whose tensors are read from a folder one at a time.

    Raises:
        BaseNeeded: a parameter is on the meta device.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise BaseNeeded(
            "only a run of the model tells where the adapter acts, and the model's folder cannot be run",
            next_step="load the model, and save lorac.merge_into(model, adapters) by its save_pretrained",
        )


def is_dynamo_error(error: Exception) -> bool:
    """Return whether torch's compiler raised an error; some ops, such as torch.cond, call the compiler."""
    return type(error).__module__.startswith("torch._dynamo")


@contextmanager
def seed_random_numbers(model: nn.Module, seed: int) -> Iterator[Callable[[], bool]]:
    """Seed all random numbers inside the block, and restore all random states after it.

    Args:
        model: as ``preserve_random_state`` takes it.
        seed: seed of all generators except the model's own.

    Yields:
        A function that returns whether a random number was drawn so far.
    """
    devices = _devices(model)
    with preserve_random_state(model):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = _get_random_states(devices)
        yield lambda: before != _get_random_states(devices)


def _get_random_states(devices: Collection[torch.device]) -> list[bytes]:
    """Return the random states of torch, NumPy and Python for comparison."""
    drawn = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
    others = (pickle.dumps(np.random.get_state()), pickle.dumps(random.getstate()))
    return [*(state.numpy().tobytes() for state in drawn), *others]


@contextmanager
def preserve_random_state(model: nn.Module) -> Iterator[None]:
    """Restore the random states of torch, NumPy, Python and the model's own generators after the block.

    Args:
        model: the model; states of its devices are restored.
    """
    # Test classes directly, since torch makes isinstance run Python code.
    generators: list[torch.Generator] = [
        value for module in model.modules() for value in vars(module).values() if torch.Generator in type(value).__mro__
    ]
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


class WatchingMode(DispatchMode):
    """A dispatch mode that observes every op and lets ``torch.cond`` compile its branches.

    Under any other mode torch compiles nothing, and leaves the same code uncompiled for the rest of the process.
    """

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Return True, so that torch does not disable its compiler."""
        return True


class _WeightWriteDetector(WatchingMode):
    """A mode that refuses ops that would write into weights.

    Args:
        weights: storage address of a weight -> its name.
    """

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()
        self._weights = weights
        self._name: str | None = None

    def handle(self, op: Any, /, *args: Any, **kwargs: Any) -> Any:
        for tensor in find_written_tensors(op, args, kwargs):
            name = self._weights.get(_get_storage_address(tensor) or 0)
            if name is not None:
                self._name = self._name or name
                self.raise_if_refused()
        return op(*args, **kwargs)

    def raise_if_refused(self) -> None:
        """Raise ``WeightWritten`` if an op was refused."""
        if self._name is not None:
            raise WeightWritten(self._name)


def _get_storage_address(tensor: Tensor) -> int | None:
    """Return the address of a tensor's storage; None for a tensor without storage, as on the meta device."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):  # a subclass without storage
        return None


def _devices(model: nn.Module) -> list[torch.device]:
    """Return the devices, except the CPU, that draw random numbers for a model."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters() if parameter.is_cuda))
