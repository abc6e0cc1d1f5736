"""The journal for readers: a line while it runs, the causes of what is not right, and docs/models.md."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from campaigns.zoo import journal
from campaigns.zoo.checking import FIXED, HOST_CANNOT, OK, PEFT_CANNOT, REFUSED, TIMEOUT, UNTYPED, WRONG
from campaigns.zoo.exceptions import LEFT_OUT
from campaigns.zoo.generating import FORMS, NONE, TIES
from campaigns.zoo.once_refused import ONCE_REFUSED

Record = Mapping[str, Any]
WAYS = ("eager live", "onnxruntime live", "onnxruntime fused")
EAGER, LIVE, FUSED = WAYS
ENGINES = ("openvino live", "aoti live")
WORST_RATIO = 3
OURS = ("verification_failed", "self_test_failed", "wrong_level")
"""Codes of errors that tell of a fault of lorac's, not of a model: named, but nobody's choice."""
_DIFFERING = (
    (r", which .* asks for.*", ""),
    (r"'[^']*'|\"[^\"]*\"|\S*/\S+|\blorac_\w+", "…"),
    (r"-?\d[\d.,e+-]*%?", "N"),
    (r"\b\w+For\w+\b|\b\w+Model\b", "…"),
    (r"([\[({])(?:…|N)(?:, (?:…|N))*([\])}])", r"\1…\2"),
)
"""(pattern, what stands instead) of what a message has of one model alone."""
_PLACE = re.compile(r"\blorac/(?:\w+/)*(\w+\.py):\d+:")
"""A line of lorac's: its folder and number are those of the commit that ran, and files move."""
UNKNOWN = "–"
"""The outcome on a way that was not run."""
NOT_RUN = "not-run"
"""The outcome of a model that no journal says anything of."""
HEAD = """# Models

Every model is tiny and random. PEFT writes an adapter for it (LoRA on every layer that its LoRA adapts, experts by
"all-linear", and its other types on small models), and lorac has to answer as PEFT does: at the example's size and at
another, with the adapter, without it and with it again. Of a detector (*-scores*) the backbone and `rpn.head`
were run, without the choice among boxes: compile the backbone, as [Image models](images.md#convolutions) shows.

- *ok*: all of that.
- *fixed*: right, but some sizes cannot vary, because the model's Python loops over them. The error names the line.
- *refused*: another error of lorac's, which says what to do.
- *wrong*: other numbers than PEFT's or the base's. *untyped*: any other error.

Models that fail without lorac, or in PEFT, stand at the end with the reason and are not counted. Seconds are of one
processor; the ratio is to exporting the same model to ONNX Runtime without lorac.
"""


# ── One model ────────────────────────────────────────────────────────────────────────────────────────────────────────
def summary(record: Record) -> str:
    """One line."""
    if "engines" in record and "ways" not in record:
        return ", ".join(f"{engine} {_one(found)}" for engine, found in record["engines"].items())
    if "outcome" not in record and "ways" not in record:
        return ", ".join(f"{form} {record['generation'].get(form, {}).get('outcome', UNKNOWN)}" for form in FORMS)
    if "outcome" in record:
        return f"{record['outcome']} ({record['class']}: {record['message'][:100]})"
    ways = [f"{way} {_one(found)}" for way, found in record["ways"].items()]
    return f"{', '.join(ways)}; {record.get('seconds', '?')} s"


def _one(found: Record) -> str:
    return OK if found["outcome"] == OK else f"{found['outcome']} ({found['class']}: {found['message'][:100]})"


def outcome(record: Record, way: str) -> str:
    """Return the outcome of a model on a way, or why it did not get there."""
    return str(record["outcome"] if "outcome" in record else record["ways"].get(way, {}).get("outcome", UNKNOWN))


def counted(record: Record) -> bool:
    """Whether PEFT itself runs it."""
    return record.get("outcome") not in (HOST_CANNOT, PEFT_CANNOT)


def ratio(record: Record, way: str = LIVE) -> float | None:
    """Seconds of compiling over those of the export without lorac, where both ended well."""
    plain, found = record.get("plain", {}), record.get("ways", {}).get(way, {})
    both = plain.get("outcome") == OK and found.get("outcome") == OK
    return found["seconds"] / plain["seconds"] if both else None


# ── Causes ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass
class Cause:
    """Failures that have one reason, as far as the error tells.

    Attributes:
        outcome, kind, message, line: of the error; numbers and names in the message are left out.
        ways, models: where it was met.
        example: one message whole.
    """

    outcome: str
    kind: str
    message: str
    line: str
    ways: set[str] = field(default_factory=set)
    models: set[str] = field(default_factory=set)
    example: str = ""


def found_causes(records: Iterable[Record], *, hosts: bool = False) -> list[Cause]:
    """All causes, the most frequent first.

    Args:
        records: of the journal.
        hosts: also what hosts and PEFT cannot.
    """
    causes: dict[tuple[str, ...], Cause] = {}
    for record, way, found in _failures(records):
        if found["outcome"] in (HOST_CANNOT, PEFT_CANNOT) and not hosts:
            continue
        line = found["lines"][-1] if found["lines"] else ""
        key = (found["outcome"], found["class"], general(found["message"]), re.sub(r":\d+:", ":", line))
        cause = causes.setdefault(key, Cause(*key[:3], line))
        cause.ways.add(way)
        cause.models.add(record["model"])
        cause.example = cause.example or found["message"]
    return sorted(causes.values(), key=lambda cause: (-len(cause.models), cause.kind, cause.message))


def _failures(records: Iterable[Record]) -> Iterator[tuple[Record, str, Record]]:
    for record in records:
        if "outcome" in record:
            yield record, "before lorac", record
            continue
        for way, found in record["ways"].items():
            if found["outcome"] != OK:
                yield record, way, found
        for way, found in record.get("ordinary", {}).items():
            if found["outcome"] not in (OK, PEFT_CANNOT):
                yield record, f"{way}, ordinary layers", found


def general(message: str) -> str:
    """Return a message without what differs from model to model: names, paths, lines of code and numbers."""
    for pattern, instead in _DIFFERING:
        message = re.sub(pattern, instead, message)
    return message


def causes(records: Iterable[Record]) -> str:
    """Return the causes as text, what hosts and PEFT cannot at the end."""
    lines = []
    for cause in sorted(found_causes(records, hosts=True), key=lambda c: c.outcome in (HOST_CANNOT, PEFT_CANNOT)):
        models = sorted(name.partition("/")[2] for name in cause.models)
        lines += [
            f"{len(models):4} {cause.outcome}: {cause.kind}: {cause.example}",
            f"     at {cause.line}",
            f"     {', '.join(sorted(cause.ways))}: {', '.join(models)}",
        ]
    return "\n".join(lines) + "\n"


# ── The page ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def kept_page() -> str:
    """docs/models.md, of the records that are kept."""
    return page(journal.read(journal.KEPT).values(), {f"transformers/{kind}": why for kind, why in LEFT_OUT.items()})


def page(given: Iterable[Record], left_out: Mapping[str, str]) -> str:
    """docs/models.md.

    Args:
        given: records of the journal.
        left_out: models that are no entries, with the reason.
    """
    every = sorted(given, key=lambda record: record["model"])
    records = [record for record in every if record.get("outcome") != NOT_RUN]
    unknown = [record["model"] for record in every if record.get("outcome") == NOT_RUN]
    if not records:
        raise SystemExit("the journal is empty: make zoo")
    families = defaultdict(list)
    for record in records:
        families[record["family"]].append(record)
    parts = [HEAD, _totals(records), _overview(families), _why(records), _slow(records)]
    parts += [_generation(every), *filter(None, [_engines(every)])]
    parts += [_family(name, members) for name, members in sorted(families.items())]
    return "\n".join([*parts, not_compared(records, left_out), *_not_run(unknown), _foot(records)])


def _foot(records: Sequence[Record]) -> str:
    named = sorted({", ".join(f"{name} {value}" for name, value in record["versions"].items()) for record in records})
    days = sorted({record["at"] for record in records})
    made = "Made by `python -m campaigns.zoo page` from `docs/models.jsonl`, where `make zoo` puts its results"
    return f"\n*{made}; with {'; '.join(named)}; {days[0]} to {days[-1]}.*\n"


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.1%})" if whole else "0 of 0"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _totals(records: Sequence[Record]) -> str:
    run = [record for record in records if counted(record)]
    eager = [record for record in run if outcome(record, EAGER) == OK]

    def ok(way: str, among: Sequence[Record], family: str = "") -> str:
        members = [r for r in among if outcome(r, way) != UNKNOWN and (not family or r["family"] == family)]
        return _share(sum(outcome(record, way) == OK for record in members), len(members))

    def fixed(way: str, among: Sequence[Record]) -> str:
        members = [r for r in among if outcome(r, way) != UNKNOWN]
        return _share(sum(outcome(record, way) in (OK, FIXED) for record in members), len(members))

    ratios = [r for record in run if (r := ratio(record)) is not None]
    of = {name: sum(name in {outcome(r, way) for way in WAYS} for r in run) for name in (WRONG, UNTYPED, TIMEOUT)}
    ours = sum(any(found.get("code") in OURS for found in record["ways"].values()) for record in run)
    rows = [
        ("wrong", str(of[WRONG]), "0"),
        ("untyped", str(of[UNTYPED]), "0"),
        (f"refused by lorac's own checks ({', '.join(OURS)})", str(ours), "0"),
        ("over their time or memory", str(of[TIMEOUT]), "0"),
        ("eager, of what PEFT runs", ok(EAGER, run), "98 %"),
        ("ONNX Runtime live, of what eager runs", ok(LIVE, eager), "92 %"),
        ("ONNX Runtime fused, of what eager runs", ok(FUSED, eager), "92 %"),
        ("ONNX Runtime live, of what eager runs, with those at fixed sizes", fixed(LIVE, eager), ""),
        ("vision-language, ONNX Runtime", ok(LIVE, run, "vision-language"), "9 of 12"),
        ("CTC, ONNX Runtime", ok(LIVE, run, "CTC"), "9 of 11"),
        ("experts, ONNX Runtime", ok(LIVE, run, "experts"), "8 of 10"),
        (f"over {WORST_RATIO} times the plain export", str(sum(r > WORST_RATIO for r in ratios)), "0"),
    ]
    title = f"## In all\n\n{len(records)} models, {len(run)} of which PEFT runs.\n"
    return "\n".join([title, _table(("", "now", "promised"), rows)])


def _overview(families: Mapping[str, Sequence[Record]]) -> str:
    columns = (
        "family",
        "models",
        "PEFT runs",
        "eager",
        "live",
        "fused",
        "fixed",
        "refused",
        "wrong",
        "untyped",
        "seconds",
        "ratio",
    )
    rows = []
    for name, members in sorted(families.items()):
        run = [record for record in members if counted(record)]
        outcomes = {way: [outcome(record, way) for record in run] for way in WAYS}
        every = [set(outcomes) for outcomes in zip(*outcomes.values(), strict=True)]
        seconds = [r["ways"][LIVE]["seconds"] for r in run if outcome(r, LIVE) == OK]
        ratios = [found for record in run if (found := ratio(record)) is not None]
        rows.append((
            name, str(len(members)), str(len(run)), *(str(outcomes[way].count(OK)) for way in WAYS),
            *(str(sum(one in found for found in every)) for one in (FIXED, REFUSED, WRONG, UNTYPED)),
            _median(seconds), _median(ratios),
        ))  # fmt: skip
    note = "Models that are *ok* by target and mode, and those that are anything else on any; medians of live.\n"
    return "\n".join(["## By family\n", note, _table(columns, rows)])


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f}" if values else "–"


def _why(records: Sequence[Record]) -> str:
    rows = [
        (
            str(len(cause.models)),
            cause.outcome,
            cause.kind,
            _cell(cause.message),
            "`" + _cell(_PLACE.sub(r"\1:", cause.line)) + "`",
            _some(cause.models),
        )
        for cause in found_causes(records)
    ]
    columns = ("models", "outcome", "error", "what it says", "innermost line", "such as")
    return "\n".join(["## Why\n", _table(columns, rows)])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'")[:160]


def _some(models: Iterable[str], most: int = 4) -> str:
    names = sorted(name.partition("/")[2] for name in models)
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _slow(records: Sequence[Record]) -> str:
    found = sorted(((r, record) for record in records if (r := ratio(record)) is not None), key=lambda pair: -pair[0])
    rows = [
        (record["model"], f"{record['plain']['seconds']:.1f}", f"{record['ways'][LIVE]['seconds']:.1f}", f"{r:.2f}")
        for r, record in found[:10]
    ]
    return "\n".join(["## Dearest to compile\n", _table(("model", "plain export", "lorac live", "ratio"), rows)])


_GENERATION = """## Generation

On ONNX Runtime over a cache, of models that generate: tokens against those of PEFT's rows alone, greedily of one row,
of a batch of other lengths (*ragged*), of rows with choices of their own, of three beams, with an image; with int4
weights they have only to come. *ties* is *ok* but for a token that PEFT's own scores do not tell from another. By
`python -m campaigns.zoo run --generation`; a model that this was not run for is *not run*.
"""


def _generation(records: Sequence[Record]) -> str:
    families = defaultdict(list)
    for record in records:
        families[record["family"]].append(record.get("generation"))
    rows = []
    for name, members in sorted(families.items()):
        found = [one for one in members if one and FORMS[0] in one]
        columns = [[one[form]["outcome"] for one in found] for form in FORMS]
        of = [[outcome for outcome in column if outcome not in (NONE, HOST_CANNOT)] for column in columns]
        if found:
            shares = [f"{sum(o in (OK, TIES) for o in column)} of {len(column)}" if column else NONE for column in of]
            rows.append((name, str(len(found)), *shares, str(members.count(None))))
    failing = [
        (record["model"].partition("/")[2], *(found[form]["outcome"] for form in FORMS), _cell(_first_of(found)))
        for record in records
        if FORMS[0] in (found := record.get("generation", {})) and _first_of(found)
    ]
    table = _table(("family", "models", *FORMS, "not run"), rows)
    return "\n".join([_GENERATION, table, _table(("model", *FORMS, "why"), failing)])


_ENGINES = """## OpenVINO and AOTInductor

The same comparison in mode live on further targets, of models drawn by the hashes of their names from each family in
turn: {drawn}. Quick models were drawn: ONNX Runtime compiles most of OpenVINO's in 12 seconds, and most of
AOTInductor's, which compiles slowly, in 3; of some families none was. By
`python -m campaigns.zoo run --engine "openvino live"`, with {versions}; {days}.
"""


def _engines(records: Sequence[Record]) -> str:
    """Count, family by family, the models of the sample that each further target runs, of those that PEFT does."""
    found = {record["model"]: record["engines"] for record in records if "engines" in record}
    every = [one for engines in found.values() for one in engines.values()]
    if not every:
        return ""
    families = {record["model"]: record["family"] for record in records}

    def share(engine: str, family: str = "") -> str:
        outcomes = [
            engines[engine]["outcome"]
            for model, engines in found.items()
            if engine in engines and family in ("", families[model]) and counted(engines[engine])
        ]
        return f"{outcomes.count(OK)} of {len(outcomes)}" if outcomes else UNKNOWN

    names = sorted({families[model] for model in found})
    rows = [(name, *(share(engine, name) for engine in ENGINES)) for name in names]
    rows.append(("all", *(share(engine) for engine in ENGINES)))
    failing = []
    for model, engines in sorted(found.items()):
        bad = [one for one in engines.values() if one["outcome"] != OK and counted(one)]
        outcomes = (engines[engine]["outcome"] if engine in engines else UNKNOWN for engine in ENGINES)
        why = f"{bad[0]['class']}: {general(bad[0]['message'])}" if bad else ""
        failing += [(model.partition("/")[2], *outcomes, _cell(why))] * bool(bad)
    head = _ENGINES.format(
        drawn=", ".join(f"{sum(engine in engines for engines in found.values())} on {engine}" for engine in ENGINES),
        versions="; ".join(
            sorted({", ".join(f"{k} {v}" for k, v in sorted(one["versions"].items())) for one in every})
        ),
        days=" to ".join(sorted({min(one["at"] for one in every), max(one["at"] for one in every)})),
    )
    return "\n".join([head, _table(("family", *ENGINES), rows), _table(("model", *ENGINES, "why"), failing)])


def once_refused(records: Iterable[Record]) -> str:
    """Return the families that were refused when they were first tried, with the reasons then and what is so now."""
    found = {record["model"]: record.get("generation", {}) for record in records}
    rows = []
    for family, reason in sorted(ONCE_REFUSED.items()):
        now = found.get(f"transformers/{family}", {})
        outcomes = [now[form]["outcome"] if form in now else UNKNOWN for form in FORMS]
        rows.append((family, reason, *outcomes, _cell(_first_of(now)) if FORMS[0] in now else ""))
    return _table(("family", "then", *FORMS, "why"), rows)


def _first_of(found: Record) -> str:
    """Return the first error of a model's generation."""
    forms = (found[form] for form in FORMS)
    return next((f"{form['class']}: {general(form['message'])}" for form in forms if "message" in form), "")


def _family(name: str, members: Sequence[Record]) -> str:
    run = [record for record in members if counted(record)]
    rest = [record for record in run if {outcome(record, way) for way in WAYS} - {OK, UNKNOWN}]
    fine = [record["model"].partition("/")[2] for record in run if record not in rest]
    rows = [(r["model"].partition("/")[2], *(outcome(r, way) for way in WAYS), _cell(_first(r))) for r in rest]
    parts = [f"## {name}\n", f"{len(fine)} all right: {', '.join(fine) or 'none'}.\n"]
    return "\n".join(parts + ([_table(("model", "eager", "live", "fused", "why"), rows)] if rows else []))


def not_compared(records: Iterable[Record], left_out: Mapping[str, str]) -> str:
    """Name every model that was not compared, whose doing that is, and why."""
    found = [record for record in records if not counted(record)]
    rows = [(r["model"], "the host" if r["outcome"] == HOST_CANNOT else "PEFT", _cell(_reason(r))) for r in found]
    rows += [(name, "the zoo", _cell(reason)) for name, reason in left_out.items()]
    return "\n".join(["## Not compared\n", _table(("model", "who cannot", "why"), sorted(rows))])


def _not_run(names: Sequence[str]) -> list[str]:
    return [f"## Not run\n\n{', '.join(names)}.\n"] if names else []


def _reason(record: Record) -> str:
    return f"{record['class']}: {record['message']}"


def _first(record: Record) -> str:
    failures = [record] if "outcome" in record else [f for f in record["ways"].values() if f["outcome"] != OK]
    return f"{failures[0]['class']}: {general(failures[0]['message'])}"
