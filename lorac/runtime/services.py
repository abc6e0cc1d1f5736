"""What only the compiler can do, handed to the runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorac.ir.slots.plans import PreparedAdapter
from lorac.runtime.traits import ModelTraits


def _as_given(inputs: Any) -> Any:
    return inputs


@dataclass(frozen=True)
class Services:
    """What only the compiler can do, handed to the runtime.

    Attributes:
        load: (source, name) -> adapter: read a file, or make a fresh variant's tensors.
        outline: adapter -> its normal forms, right in shape only; needs no base weights.
        recompile: (target, mode, **options) -> another Compiled, from the host model.
        save: (compiled, folder, what writes its tokenizer into a folder, if anything) -> None.
        record: adapter -> all that a file says of it beside its tensors, as JSON.
        save_adapter: (adapter, folder) -> None: write it as PEFT does.
        explain: (compiled, another target to tell of, or None) -> report.
        stages: () -> what the passes did to each graph (``lorac.report.graph_views.PassHistory``).
        casts: (dtype of the model, or asked for, dtype the target computes in), where it lacks the first.
        traits: graph name -> what others ask of its host besides calling it.
        fit: what a call is given -> the same in the dtype that was asked for instead of the model's own.
    """

    load: Callable[[Any, str | None], Any]
    outline: Callable[[Any], PreparedAdapter]
    recompile: Callable[..., Any]
    save: Callable[[Any, Any, Any], None]
    record: Callable[[Any], Mapping[str, Any]]
    save_adapter: Callable[[Any, Any], None]
    explain: Callable[[Any, str | None], Any]
    stages: Callable[[], Any]
    casts: Sequence[tuple[Any, Any]] = ()
    traits: Mapping[str, ModelTraits] = field(default_factory=dict)
    fit: Callable[[Any], Any] = _as_given
