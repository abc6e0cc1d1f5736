"""Modes of torch that see the calls inside a block: of its functions, or of the ops that these call."""

from abc import ABC, abstractmethod
from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class FunctionMode(TorchFunctionMode, ABC):
    """A mode that sees each call of a function of torch inside its block."""

    @abstractmethod
    def handle(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Return the result of a call of a function; calls inside this method are not handled."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's
        return self.handle(func, *args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode, ABC):
    """A mode that sees each call of an op inside its block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's

    @abstractmethod
    def handle(self, op: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Return the result of a call of an op; ops inside this method are not handled."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's
        return self.handle(func, *args, **(kwargs or {}))
