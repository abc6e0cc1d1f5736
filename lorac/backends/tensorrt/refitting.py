"""In-place replacement of weights that are constants of a plan.

Only weights that were marked when the plan was built can be replaced, and only on a GPU. Weights that a choice of
adapters does not change are rewritten from the base, so nothing of the previous choice remains.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from lorac.backends.tensorrt.device.interfaces import CudaEngine, Refitter
from lorac.backends.tensorrt.library import BuildMessages, TensorRTLibrary, collect_errors
from lorac.errors import Unavailable

if TYPE_CHECKING:
    import tensorrt

_INSTEAD = "compile with mode='fused' alone: merged weights are then inputs of the plan"


def mark_refittable(network: tensorrt.INetworkDefinition, names: Iterable[str]) -> None:
    """Mark the weights of a network that can later be replaced in its plan.

    The plan must then be built with ``refit_flag()`` and one profile, the maximum that TensorRT supports with it.

    Raises:
        Unavailable: TensorRT cannot replace a weight, for example because the parser folded it.
    """
    for name in names:
        with collect_errors() as messages:
            if not network.mark_weights_refittable(name):
                raise _refit_error(f"TensorRT does not let '{name}' be replaced", messages)


def refit_flag(library: TensorRTLibrary) -> tensorrt.BuilderFlag:
    """Return the builder flag for plans whose marked weights can be replaced."""
    return library.module.BuilderFlag.REFIT_INDIVIDUAL


class WeightRefitter:
    """A writer of the marked weights of a loaded plan.

    Args:
        engine: TensorRT's engine.
        memory: weight -> the GPU memory with the active choice's value.
        library: the library that loaded the engine.
        refitter: TensorRT's refitter for the engine.

    Raises:
        Unavailable: the plan's weights cannot be replaced, or have other dtypes or sizes.
    """

    def __init__(
        self,
        engine: CudaEngine,
        memory: Mapping[str, Tensor],
        library: TensorRTLibrary,
        refitter: Refitter | None = None,
    ) -> None:
        if not engine.refittable:
            raise Unavailable(
                "no weight of the plan can be replaced, since the plan was not built for that", next_step=_INSTEAD
            )
        self.memory, self._library = memory, library
        if refitter is None:
            with collect_errors() as messages:
                try:
                    refitter = library.module.Refitter(engine, library.logger)
                except TypeError as error:  # the bindings raise it if a constructor returns nothing
                    raise _refit_error("TensorRT lets no weight of the plan be replaced", messages) from error
        self._refitter = refitter
        # Checking for NaN costs more than writing, and lorac refuses adapters with NaN when they are added.
        self._refitter.weights_validation = False
        self._changed: frozenset[str] = frozenset()
        for name, tensor in memory.items():
            self._check(name, tensor)

    def write(self, changed: Collection[str]) -> int:
        """Write the weights that the previous or the active choice changes.

        The caller must block calls, and must have waited for queued ones (``PlanRunner.writing``). A failed write may
        be partial; the next one writes all of the weights again.

        Args:
            changed: the weights that differ from the base's.

        Returns:
            The number of bytes written.

        Raises:
            Unavailable: TensorRT cannot replace the weights.
        """
        self._changed |= frozenset(changed)
        with collect_errors() as messages:
            for name in sorted(self._changed):
                self._set(name, messages)
            partners = self._refitter.get_missing_weights()  # weights that the builder combined with these
            for name in sorted(partners):
                self._set(name, messages)
            written = {*self._changed, *partners}
            if written and not self._refitter.refit_cuda_engine():
                raise _refit_error("TensorRT does not replace the weights", messages)
        for name in written:
            self._refitter.unset_named_weights(name)
        self._changed = frozenset(changed)
        return sum(self.memory[name].nbytes for name in written)

    def _set(self, name: str, messages: BuildMessages) -> None:
        tensor = self.memory.get(name)
        if tensor is None:
            raise Unavailable(
                f"the plan combines '{name}' with weights to be replaced, and its value was not kept",
                next_step=_INSTEAD,
            )
        trt = self._library.module
        weights = trt.Weights(self._library.dtype(tensor.dtype), tensor.data_ptr(), tensor.numel())
        place = trt.TensorLocation.DEVICE if tensor.is_cuda else trt.TensorLocation.HOST
        if not self._refitter.set_named_weights(name, weights, place):
            raise _refit_error(f"TensorRT does not take '{name}'", messages)

    def _check(self, name: str, tensor: Tensor) -> None:
        """Refuse a weight of another dtype or size now, instead of at the first swap."""
        built = self._refitter.get_weights_prototype(name)
        wanted = (self._library.dtype(tensor.dtype), tensor.numel())
        if (built.dtype, built.size) != wanted or not tensor.is_contiguous():
            raise Unavailable(
                f"'{name}' was built with {built.size} numbers of {built.dtype.name}, and {tensor.numel()} of "
                f"{tensor.dtype} are to be written",
                next_step="this is a bug of lorac's, not of your model",
            )


def _refit_error(fault: str, messages: BuildMessages) -> Unavailable:
    return Unavailable(f"{fault}: {messages.why()}", next_step=_INSTEAD)
