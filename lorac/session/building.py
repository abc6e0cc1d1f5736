"""Build the engine of a session."""

from __future__ import annotations

import dataclasses

from lorac.adapters.training_terms import AdapterTerms
from lorac.ir.graph.program import Program
from lorac.ir.slots.choice import Choice
from lorac.ir.slots.composition import compose_choice
from lorac.progress import progress
from lorac.session.lowering.lower import lower_model, lower_stored
from lorac.session.session import Session
from lorac.target.backend import BuildRequest, TargetOptions
from lorac.target.engine import Engine


def build_engine(session: Session, choice: Choice, stored: Program | None = None) -> Engine:
    """Build an engine, and release the model if the engine does not run it.

    Args:
        session: the model, adapters and backend.
        choice: the adapters of a baked engine, which it holds for good.
        stored: an artifact's program at level expanded; None: the model is captured if the target needs a program.
    """
    backend, options = session.backend, session.options
    request = make_build_request(session, choice)
    backend.check(request)
    dialect = backend.dialect_for(options)
    with progress(f"compiling for {dialect.name}") as report:
        report.step("capture and passes")
        if stored is not None:
            request = dataclasses.replace(request, program=lower_stored(session, stored, options.aux))
        elif dialect.emits:
            request = dataclasses.replace(request, program=lower_model(session, options.aux))
        engine = backend.build(request)
    if engine.files is not None:
        session.release_model(backend.read_base_weights(engine.files))
    return engine


def make_build_request(session: Session, choice: Choice, program: Program | None = None) -> BuildRequest[TargetOptions]:
    """Return what a backend needs to build or store an engine."""
    return BuildRequest(
        model=session.host.module,
        sites=session.sites,
        plans=session.plans,
        base=session.base,
        mode=session.mode,
        snapshot=compose_choice(session.plans, session.pool, choice, session.base),
        options=session.options,
        terms=AdapterTerms(session.pool, session.preparer),
        program=program,
    )
