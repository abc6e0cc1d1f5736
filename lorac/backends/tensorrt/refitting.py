"""Weights of a plan replaced in place, where they are constants of the plan and no inputs.

Only those that were marked when it was built can be, and only on a GPU. Whatever a choice of adapters leaves alone is
written from the base again, so that nothing of the choice before stays.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from lorac.backends.tensorrt import library
from lorac.backends.tensorrt.device.interfaces import CudaEngine, Refitter
from lorac.errors import OptionError, Unavailable, nearest_name

Tensor = torch.Tensor
_INSTEAD = "compile with mode='fused' alone: merged weights are then inputs of the plan"


def mark_refittable(network: Any, names: Iterable[str], known: Collection[str]) -> int:
    """Mark weights of a network, so that the plan built of it lets them be replaced and no others.

    The plan is then built with ``flag()`` and one profile: TensorRT takes no more with it.

    Args:
        network: TensorRT's, parsed.
        names: of the weights, as the emitted model has them.
        known: names of all its weights.

    Returns:
        How many were marked.

    Raises:
        OptionError: a weight is not in the model.
        Unavailable: it is, and TensorRT does not let it be replaced, as where it computed with it when it parsed.
    """
    wanted = list(names)
    for name in wanted:
        if name not in known:
            raise OptionError(
                f"the program has no weight '{name}' to replace",
                nearest=nearest_name(name, known),
                next_step="this is a bug of lorac's, not of your model",
            )
        _mark_weight(network, name)
    return len(wanted)


def _mark_weight(network: Any, name: str) -> None:
    with library.collect_errors() as said:
        if not network.mark_weights_refittable(name):
            raise Unavailable(f"TensorRT does not let '{name}' be replaced: {said.why()}", next_step=_INSTEAD)


def refit_flag() -> Any:
    """The builder's flag for plans of which the marked weights can be replaced."""
    return library.trt().BuilderFlag.REFIT_INDIVIDUAL


class WeightRefitter:
    """Replaces the marked weights of a loaded plan.

    Args:
        engine: TensorRT's.
        memory: weight -> the GPU's memory that holds what it is to be: as a choice has it, else as the base has it.
        refitter: TensorRT's, made for the engine.

    Raises:
        Unavailable: the plan lets none be replaced, or not of these dtypes and sizes.
    """

    def __init__(self, engine: CudaEngine, memory: Mapping[str, Tensor], refitter: Refitter | None = None) -> None:
        if not engine.refittable:
            raise Unavailable(
                "no weight of the plan can be replaced: it was not built for that",
                next_step=_INSTEAD,
            )
        self.memory = memory
        self._refitter = _create_refitter(engine) if refitter is None else refitter
        # Looking for NaN costs more than writing, and lorac refuses adapters that have any where they come in.
        self._refitter.weights_validation = False
        self._touched: frozenset[str] = frozenset()
        for name, tensor in memory.items():
            self._check(name, tensor)

    def write(self, touched: Collection[str]) -> int:
        """Write what the memory holds, into the weights that the choice before touched or this one does.

        The caller keeps calls away, and has waited for those that were queued (``Running.writing``). Where it fails,
        some may be written: the next call writes all of them again.

        Args:
            touched: the weights that are not the base's now.

        Returns:
            Bytes written.

        Raises:
            Unavailable: TensorRT fails.
        """
        self._touched |= frozenset(touched)
        with library.collect_errors() as said:
            written = self._set_all(self._touched, said)
            if written and not self._refitter.refit_cuda_engine():
                raise _refit_error("TensorRT does not replace the weights", said)
        for name in written:
            self._refitter.unset_named_weights(name)
        self._touched = frozenset(touched)
        return sum(self.memory[name].nbytes for name in written)

    def _set_all(self, names: Collection[str], said: library.BuildMessages) -> set[str]:
        """Say what weights are to be, with those that the builder joined with them: all have to be written together."""
        for name in sorted(names):
            self._set(name, said)
        partners = self._refitter.get_missing_weights()
        for name in sorted(partners):
            self._set(name, said)
        return {*names, *partners}

    def _set(self, name: str, said: library.BuildMessages) -> None:
        tensor = self.memory.get(name)
        if tensor is None:
            raise Unavailable(
                f"the plan joined '{name}' with weights that are to be replaced, and it was not kept",
                next_step=_INSTEAD,
            )
        trt = library.trt()
        weights = trt.Weights(library.trt_dtype(tensor.dtype), tensor.data_ptr(), tensor.numel())
        place = trt.TensorLocation.DEVICE if tensor.is_cuda else trt.TensorLocation.HOST
        if not self._refitter.set_named_weights(name, weights, place):
            raise _refit_error(f"TensorRT does not take '{name}'", said)

    def _check(self, name: str, tensor: Tensor) -> None:
        """A weight of another dtype or size would be refused at the first swap; it is where it was compiled."""
        built = self._refitter.get_weights_prototype(name)
        wanted = (library.trt_dtype(tensor.dtype), tensor.numel())
        if (built.dtype, built.size) != wanted or not tensor.is_contiguous():
            raise Unavailable(
                f"'{name}' was built with {built.size} numbers of {built.dtype.name}, and {tensor.numel()} of "
                f"{tensor.dtype} are to be written",
                next_step="this is a bug of lorac's, not of your model",
            )


def _create_refitter(engine: CudaEngine) -> Refitter:
    with library.collect_errors() as said:
        try:
            made: Refitter = library.trt().Refitter(engine, library.logger())
        except TypeError as error:  # how the bindings tell of a constructor that gives nothing
            raise _refit_error("TensorRT lets no weight of the plan be replaced", said) from error
    return made


def _refit_error(what: str, said: library.BuildMessages) -> Unavailable:
    return Unavailable(f"{what}: {said.why()}", next_step=_INSTEAD)
