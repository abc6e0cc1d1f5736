"""A compiled model of its parts: the engine, whether built or read back, and what lives on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorac.compiler.precision import Precision
from lorac.errors import Unavailable
from lorac.formats import save_adapter
from lorac.formats.native import recorded
from lorac.ir.engine import Backend, Engine, TargetOptions
from lorac.ir.slots.choice import Spec, parse_choice
from lorac.ir.slots.site import SitePlan
from lorac.runtime.compiled import Compiled
from lorac.runtime.components import Traits
from lorac.runtime.host import Again
from lorac.runtime.module import compiled_module
from lorac.runtime.services import Services

if TYPE_CHECKING:
    from lorac.analysis.explain import Report
    from lorac.compiler.services import Lasting


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """What a compiled model is made of, besides its engine.

    Attributes:
        lasting: what lives on.
        backend: the target's.
        again: ``lorac.compile``, to compile again from the host.
        precision: what became of the model's dtype.
        traits: graph name -> what others ask of its host besides calling it.
        examples: example inputs and dynamic shapes, for compiling again.
        lacking: another target -> what it would not compute; None: nothing is known of the host.
    """

    lasting: Lasting
    backend: Backend[TargetOptions]
    again: Again
    precision: Precision = field(default_factory=Precision)
    traits: Mapping[str, Traits] = field(default_factory=dict)
    examples: Mapping[str, object] = field(default_factory=dict)
    lacking: Callable[[str], tuple[str, ...]] | None = None

    def over(self, engine: Engine, plans: Mapping[str, SitePlan], mode: str, choice: Spec) -> Compiled:
        """The compiled model over an engine, with a choice active."""
        lasting = self.lasting
        compiled = Compiled() if engine.module is None else compiled_module(engine.module)
        compiled.setup(
            engine=engine,
            plans=plans,
            sites=lasting.sites,
            base=lasting.base,
            pool=lasting.pool,
            services=self._services(),
            mode=mode,
        )
        compiled.registered()
        if mode == "baked":
            compiled.mark_baked(parse_choice(choice, lasting.pool))
        elif choice is not None:
            compiled.swap(choice)
        return compiled

    def _services(self) -> Services:
        lasting = self.lasting
        return Services(
            load=lasting.load,
            outline=lasting.outline,
            recompile=functools.partial(lasting.host.recompiled, self.again, self.examples),
            save=functools.partial(lasting.save, self.backend),
            record=recorded,
            save_adapter=lambda adapter, folder: save_adapter(adapter, folder, model=lasting.host.module),
            explain=functools.partial(_explain, self.lacking),
            stages=lasting.shown,
            casts=self.precision.lost,
            fit=self.precision.fit_call,
            traits=self.traits,
        )


def _explain(lacking: Callable[[str], tuple[str, ...]] | None, compiled: Compiled, target: str | None = None) -> Report:
    from lorac.analysis.explain import explain

    if target is None:
        return explain(compiled)
    if lacking is None:
        raise Unavailable(
            f"what '{target}' would not compute is told of a model, and this program has let go of its own",
            next_step="compile with target='eager', whose explain(target=...) tells it",
        )
    return explain(compiled, target, lacking(target))
