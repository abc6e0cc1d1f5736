"""A compiled model's summary, explanation and public names."""

from collections import Counter
from dataclasses import replace

from torch import nn

from lorac.errors import EagerOnly, UnknownAttribute, escape_controls, nearest_name
from lorac.frontend.components import MAIN_GRAPH
from lorac.ir.sites.site import KINDS_WITHOUT_WEIGHT
from lorac.ir.slots.choice import Active, choice_strengths, describe_choice
from lorac.ir.slots.composition import ComposedWeights, compose_choice
from lorac.report.dump import short_dtype
from lorac.report.explain import AdapterRow, Explanation, ProgramRow
from lorac.report.terms import UNUSED, describe_terms, describe_variant
from lorac.runtime.choice_switch import ChoiceSwitch
from lorac.session.other_vocabularies import COMPUTING_STEPS, LORAC_STEPS
from lorac.session.session import Session

_NAMES = (
    "active adapters add_adapter aux explain export export_program generate graph hold memory mode prefetch processor "
    "program_slots push_to_hub register remove_adapter save save_choice swap tokenizer"
)
INTERFACE = tuple(_NAMES.split())
"""The public attributes of a compiled model on every target."""
_LISTED_ADAPTERS = 4
"""Number of adapters that a summary names."""


def describe_compiled(cls: str, session: Session, switch: ChoiceSwitch) -> str:
    """Return a summary of a few lines: target, mode, sites, adapters, and the active choice."""
    touched = sum(not plan.empty for plan in session.plans.values())
    adapters = [f"{n} ({describe_variant(adapter.variant)})" for n, adapter in switch.pool.adapters.items()]
    more = len(adapters) - _LISTED_ADAPTERS
    listed = ", ".join([*adapters[:_LISTED_ADAPTERS], *([f"{more} more"] if more > 0 else [])])
    lines = (
        f"<{cls} for {switch.engine.target}, {switch.mode}",
        f"  sites: {touched} with slots, of {len(session.sites)}",
        f"  adapters: {listed or 'none'}",
        f"  active: {describe_choice(switch.choice)}>",
    )
    return escape_controls("\n".join(lines))


def unknown_attribute(compiled: object, name: str) -> AttributeError:
    """Return the error for an attribute that a compiled model does not have."""
    cls = type(compiled).__name__
    step = LORAC_STEPS.get(name) or COMPUTING_STEPS.get(name)
    if step is not None:
        return UnknownAttribute(f"a {cls} has no '{name}'", next_step=step)
    if name in (*INTERFACE, "save_pretrained"):  # a component's
        return UnknownAttribute(f"a {cls} has no '{name}'", next_step=f"compiled.{name} is that of all its models")
    if not name.startswith("_") and hasattr(nn.Module, name):
        return EagerOnly(
            f"a {cls} has no '{name}': it is not an nn.Module",
            next_step="compile with target='eager' to train it, or with device= or dtype= to move or cast it",
        )
    return UnknownAttribute(
        f"a {cls} has no '{name}'",
        nearest=nearest_name(name, INTERFACE, alike=0.6),
        next_step="dir(compiled) lists its attributes",
    )


def explain(
    session: Session, switch: ChoiceSwitch, other_target: str = "", unsupported_ops: tuple[str, ...] = ()
) -> Explanation:
    """Return the explanation of a compiled model's state; the last two arguments are fields of ``Explanation``."""
    plans, snapshot = session.plans, switch.state.snapshot
    terms = describe_terms(switch.prepared_adapters, plans, mode=switch.mode, snapshot=snapshot)
    unused = {path for interface in switch.engine.interfaces.values() for path in interface.unused_sites}
    rows = [row for at in terms.values() for row in at]
    for index, row in enumerate(rows):
        if row.site in unused:  # it has no slot
            swap = "none: no output depends on it"
            rows[index] = replace(row, state=UNUSED, slots=(), swap=swap, reasons=())
    adapters, strengths, apart = [], choice_strengths(switch.choice), _why_apart(session, switch)
    for name, adapter in switch.pool.adapters.items():
        own = [row for row in rows if row.adapter == name]
        states, nbytes = dict(Counter(row.state for row in own)), sum(row.nbytes for row in own)
        method, strength = describe_variant(adapter.variant), strengths.get(name, 0.0)
        adapters.append(AdapterRow(name, method, states, nbytes, strength, apart.get(name, "")))
    adaptable = [path for path, s in session.sites.items() if s.kind not in KINDS_WITHOUT_WEIGHT]
    return Explanation(
        target=switch.engine.target,
        mode=switch.mode,
        active=describe_choice(switch.choice),
        adapters=tuple(adapters),
        terms=tuple(rows),
        reserved=tuple(path for path, plan in plans.items() if not plan.empty and path not in terms),
        bare=tuple(path for path in adaptable if path not in plans or plans[path].empty),
        casts=tuple((short_dtype(a), short_dtype(b)) for a, b in session.precision.lost),
        programs=tuple(
            ProgramRow("" if name == MAIN_GRAPH else name, one.sizes.list_fixed(), one.sizes.notable, one.notes)
            for name, one in switch.engine.interfaces.items()
        ),
        other_target=other_target,
        unsupported_ops=unsupported_ops,
        rows=_describe_rows(session, switch),
    )


def _describe_rows(session: Session, switch: ChoiceSwitch) -> str:
    """Describe how rows with different choices run; empty in mode "baked", where all rows have the same choice."""
    if switch.mode != "live":
        return "" if switch.mode == "baked" else "a call for each choice, since weights hold one at a time"
    engine, graphs = switch.engine, [*session.traits]
    why = next(filter(None, (engine.why_apart(ComposedWeights(()), graph) for graph in graphs)), None)
    if why is not None:
        return f"a call for each choice, since {why}"
    most = min((places for graph in graphs if (places := engine.most_places(graph)) is not None), default=None)
    limit = f", up to {most} choices" if most else ""
    return f"one call for any mix of adapters{limit}; it reads less memory if rows with one adapter are neighbours"


def _why_apart(session: Session, switch: ChoiceSwitch) -> dict[str, str]:
    """Return adapter name -> reason why its rows take a call of their own; empty if they share calls."""
    if switch.mode != "live" or switch.engine.why_apart(ComposedWeights(()), next(iter(session.traits))):
        return {}
    found = {}
    for name, prepared in switch.prepared_adapters.items():
        snapshot = compose_choice(session.plans, {name: prepared}, ((name, Active()),), session.base)
        found[name] = next(filter(None, (switch.engine.why_apart(snapshot, graph) for graph in session.traits)), "")
    return found
