"""A compiled model of its parts: the engine, whether built or read back, and what lives on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorac.errors import Unavailable
from lorac.formats import save_adapter
from lorac.formats.native import describe_adapter
from lorac.ir.slots.choice import ChoiceSpec, parse_choice
from lorac.ir.slots.plans import SitePlan
from lorac.runtime.services import Services
from lorac.runtime.traits import ModelTraits
from lorac.session.compiled import Compiled
from lorac.session.compiled_module import compiled_module
from lorac.session.host_model import Again
from lorac.session.precision import Precision
from lorac.target.engine import Backend, Engine, TargetOptions

if TYPE_CHECKING:
    from lorac.report.explain import Explanation
    from lorac.session.session import Session


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

    lasting: Session
    backend: Backend[TargetOptions]
    again: Again
    precision: Precision = field(default_factory=Precision)
    traits: Mapping[str, ModelTraits] = field(default_factory=dict)
    examples: Mapping[str, object] = field(default_factory=dict)
    lacking: Callable[[str], tuple[str, ...]] | None = None

    def over(self, engine: Engine, plans: Mapping[str, SitePlan], mode: str, choice: ChoiceSpec) -> Compiled:
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
            record=describe_adapter,
            save_adapter=lambda adapter, folder: save_adapter(adapter, folder, model=lasting.host.module),
            explain=functools.partial(_explain, self.lacking),
            stages=lasting.shown,
            casts=self.precision.lost,
            fit=self.precision.fit_call,
            traits=self.traits,
        )


def _explain(
    lacking: Callable[[str], tuple[str, ...]] | None, compiled: Compiled, target: str | None = None
) -> Explanation:
    from lorac.report.explain import explain

    if target is None:
        return explain(compiled)
    if lacking is None:
        raise Unavailable(
            f"what '{target}' would not compute is told of a model, and this program has let go of its own",
            next_step="compile with target='eager', whose explain(target=...) tells it",
        )
    return explain(compiled, target, lacking(target))
