"""One model of the zoo through lorac: what comes of it, as a record.

Every step says whose it is. What the host cannot do by itself, and what PEFT cannot, is none of lorac's failures; what
lorac refuses with an error of its own is ``refused``, or ``fixed`` where that is another size than a program is right
at; numbers that are not PEFT's are ``wrong``; everything else that
is raised is ``untyped``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lorac
import lorac.errors
from campaigns.zoo import adapting
from campaigns.zoo.adapting import Adapted, Outputs, answer
from campaigns.zoo.entries import Call, Entry
from campaigns.zoo.plain import plain_export
from campaigns.zoo.ties import FirstOfEqual
from lorac.testing.eager_checks import assert_close
from lorac.testing.parity import CONTRIBUTION, assert_parity, contribution

WAYS = (("eager", "live"), ("onnxruntime", "live"), ("onnxruntime", "fused"))
"""(target, mode), each a column of the page."""
ENGINES = (("openvino", "live"), ("aoti", "live"))
"""Further targets, of which a sample of the models is run."""
EXAMPLE, OTHER = (2, 7), (3, 11)
"""(rows, length) of the call that lorac is shown, and of another that it has to answer as well."""
NARROWER = {"length": (2, 11), "rows": (3, 7), "nothing": EXAMPLE}
"""What may still vary of a program that the model's own loops fix -> (rows, length) of the other call."""
OK, FIXED, REFUSED, WRONG, UNTYPED = "ok", "fixed", "refused", "wrong", "untyped"
HOST_CANNOT, PEFT_CANNOT, TIMEOUT = "host-cannot", "peft-cannot", "timeout"
Record = dict[str, Any]
Ways = tuple[tuple[str, str], ...]


class _Stop(Exception):
    """The model does not get as far as lorac; carries the record's outcome."""

    def __init__(self, outcome: str, cause: Mapping[str, Any]) -> None:
        super().__init__(outcome)
        self.record = {"outcome": outcome, **cause}


@dataclass
class _Subject:
    """A host, its calls, and what it answers alone and as PEFT has it."""

    entry: Entry
    host: nn.Module
    calls: list[Call]
    base: list[Outputs]
    bits: dict[str, torch.Tensor]
    adapted: Adapted | None = None
    reference: list[Outputs] = field(default_factory=list)


def check(entry: Entry, *, plain: bool = True, ways: Ways = WAYS, generates: bool = False) -> Record:
    """Return the record of one model: an outcome for each way, with seconds of the processor, and of the plain export.

    Args:
        entry: the model.
        plain: also export it without lorac, to compare what that costs.
        ways: targets and modes; with none, the record says nothing of them.
        generates: also what the model generates, in each form.
    """
    record: Record = {"model": entry.name, "family": entry.family} | ({"ways": {}} if ways else {})
    with tempfile.TemporaryDirectory() as folder:
        try:
            subject = _subject(entry)
            record["parameters"] = sum(p.numel() for p in subject.host.parameters())
            record["defaults"] = _defaults(subject)
            _adapt_somehow(subject, Path(folder))
        except _Stop as stop:
            return {**record, **stop.record}
        if plain:
            record["plain"] = _timed(lambda: plain_export(subject.host, subject.calls[0], entry.shapes))
        if generates:
            record["generation"] = _generation(subject)
        if not ways:
            return record
        _ways(subject, ways, record["ways"])
        if entry.fewer and any(way["outcome"] == REFUSED for way in record["ways"].values()):
            record["ordinary"] = _ordinary(subject, Path(folder, "b"), record["ways"], ways)
    return record


def _generation(subject: _Subject) -> Record:
    from campaigns.zoo.generating import can_generate, check_generation  # it classifies failures as this file does

    assert subject.adapted is not None
    return check_generation(subject.host, subject.adapted.oracle) if can_generate(subject.host) else {}


# ── The host and PEFT ────────────────────────────────────────────────────────────────────────────────────────────────
def _subject(entry: Entry) -> _Subject:
    with _stopping(HOST_CANNOT), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # As PEFT leaves it: where a weight needs a gradient, torch folds a strided input before it multiplies, and the
        # last bits of one host differ between the two (``should_fold`` in ATen's LinearAlgebra.cpp).
        host = entry.build().eval().requires_grad_(False)
        away_from_init(host)
        calls = [entry.inputs(host, batch, length, seed) for seed, (batch, length) in enumerate((EXAMPLE, OTHER))]
        base = [answer(host, call) for call in calls]
        again = [answer(host, call) for call in calls]
        _insist(all(bool(b) for b in base), "the host answers no floating-point tensor")
        _insist(_same(base, again), "the host answers the same call differently (it draws numbers, or keeps state)")
        finite = all(bool(value.isfinite().all()) for outputs in base for value in outputs.values())
        _insist(finite, "the host answers NaN or infinity")
        with FirstOfEqual():
            first = [answer(host, call) for call in calls]
        _insist(_close(first, base), "the host chooses among equal numbers, of which torch promises none")
    return _Subject(entry, host, calls, base, adapting.bits(host))


@torch.no_grad()
def away_from_init(model: nn.Module) -> None:
    """Move every vector, and the statistics of norms, so that a dropped or swapped one shows."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim < 2 and parameter.is_floating_point():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
        if name.endswith("running_var"):
            buffer.mul_(0.7 + 0.7 * torch.rand(buffer.shape, generator=generator))


def _adapt_somehow(subject: _Subject, folder: Path) -> None:
    """Return the entry's adapter; without one on every layer, or on those that PEFT can adapt."""
    config = subject.entry.adapter
    try:
        _adapt(subject, folder / "a", adapting.lora if config is None else config)
    except _Stop:
        if config is not None:
            raise
        _adapt(subject, folder / "linears", functools.partial(adapting.lora, kernels=False))


def _adapt(subject: _Subject, folder: Path, config: Callable[[nn.Module], Any]) -> None:
    with _stopping(PEFT_CANNOT):
        adapted = adapting.written(subject.host, config(subject.host), folder, subject.calls, seed=2)
        subject.reference = [answer(adapted.oracle, call) for call in subject.calls]
        subject.adapted = adapted


def _defaults(subject: _Subject) -> str:
    """Whether lorac makes example inputs of its own, and the host takes them."""
    from lorac.frontend.host import Host

    try:
        made = Host.of(subject.host).example_inputs()
        answer(subject.host, made)
    except lorac.LoracError as error:
        return type(error).__name__
    except Exception as error:
        return f"wrong: {type(error).__name__}: {_first_line(error)}"
    return OK


# ── lorac ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _ways(subject: _Subject, ways: Ways, found: Record) -> None:
    """Fill in what comes of each way; what cannot be captured is not tried again in the target's other modes."""
    for target, mode in ways:
        before = [found[f"{target} {other}"] for t, other in ways if t == target and f"{target} {other}" in found]
        uncaptured = [record for record in before if record.get("code") == "capture_failed"]
        found[f"{target} {mode}"] = uncaptured[0] if uncaptured else _way(subject, target, mode)


def _way(subject: _Subject, target: str, mode: str) -> Record:
    record: Record = {}
    before = adapting.fingerprint(subject.host)
    try:
        begun = time.process_time()
        compiled = _compiled(subject, target, mode)
        record["seconds"] = round(time.process_time() - begun, 2)
        return {**record, **_answered(subject, compiled, target, before)}
    except lorac.LoracError as error:
        return {**record, **find_cause(error), "outcome": REFUSED, "next": error.next_step}
    except Exception as error:
        return {**record, **find_cause(error), "outcome": UNTYPED}


def _answered(subject: _Subject, compiled: Any, target: str, before: tuple[Any, ...]) -> Record:
    """Compare a compiled model's outputs; if it refuses another size, at sizes nearer the example's."""
    try:
        return _judged(subject, compiled, target, before)
    except lorac.errors.InputMismatch as error:
        refused = {**find_cause(error), "next": error.next_step}
    for free, (rows, length) in NARROWER.items():
        other = _at(subject, rows, length)
        if not _decides(other):
            continue
        with contextlib.suppress(lorac.errors.InputMismatch):
            found = _judged(other, compiled, target, before)
            return {**refused, "outcome": FIXED, "free": free} if found["outcome"] == OK else found
    return {**refused, "outcome": REFUSED}


def _at(subject: _Subject, rows: int, length: int) -> _Subject:
    """Return the same model, called at another size besides the example's."""
    assert subject.adapted is not None
    other = subject.entry.inputs(subject.host, rows, length, 1)
    base = answer(subject.host, other)
    right = answer(subject.adapted.oracle, other)
    return dataclasses.replace(
        subject,
        calls=[subject.calls[0], other],
        base=[subject.base[0], base],
        reference=[subject.reference[0], right],
    )


def _decides(subject: _Subject) -> bool:
    """Whether the adapter moves the outputs by a share that decides something, at these sizes too."""
    assert subject.adapted is not None
    right, base = map(adapting.joined, (subject.reference, subject.base))
    low, high = CONTRIBUTION
    return all(low <= share <= high for share in contribution(right, base, subject.adapted.outputs).values())


def _judged(subject: _Subject, compiled: Any, target: str, before: tuple[Any, ...]) -> Record:
    """Whether a compiled model answers rightly, and left the host alone."""
    answers = _Answers.of(compiled, subject.calls)
    try:
        _compare(subject, answers, exact=target == "eager")
        assert adapting.fingerprint(subject.host) == before, "the host's flags, modules, hooks or random state changed"
        _left_alone(subject)
    except AssertionError as error:
        return {**find_cause(error), "outcome": WRONG}
    return {"outcome": OK}


def _compiled(subject: _Subject, target: str, mode: str) -> Any:
    assert subject.adapted is not None
    shapes = None if subject.entry.shapes is None else subject.entry.shapes(subject.calls[0])
    example: dict[str, Any] = (
        {} if target == "eager" else {"example_inputs": subject.calls[0], "dynamic_shapes": shapes}
    )
    return lorac.compile(subject.host, {"a": subject.adapted.folder}, target=target, mode=mode, **example)


@dataclass(frozen=True)
class _Answers:
    """What a compiled model answers to several calls: with the adapter, without it, and with it again."""

    on: list[Outputs]
    off: list[Outputs]
    again: list[Outputs]

    @classmethod
    def of(cls, compiled: Any, calls: list[Call]) -> _Answers:
        on = [answer(compiled, call) for call in calls]
        compiled.swap(None)
        off = [answer(compiled, call) for call in calls]
        compiled.swap("a")
        return cls(on, off, [answer(compiled, call) for call in calls])


def _compare(subject: _Subject, answers: _Answers, *, exact: bool) -> None:
    """At all sizes: with the adapter what PEFT answers, without it the base, and with it again the same bits."""
    assert subject.adapted is not None
    for found, reference in zip(answers.on, subject.reference, strict=True):
        _assert_shapes(found, reference)
    on, right, base, off = map(adapting.joined, (answers.on, subject.reference, subject.base, answers.off))
    assert_parity(on, right, base, own_base=off, names=subject.adapted.outputs)
    for found, expected in zip(answers.off, subject.base, strict=True):
        _assert_base(found, expected, exact=exact)
    assert _same(answers.again, answers.on), "swapped off and on, the answer is another"


def _assert_base(found: Outputs, base: Outputs, *, exact: bool) -> None:
    assert found.keys() >= base.keys(), f"without the adapter outputs {sorted(found)}, the host has {sorted(base)}"
    for name, expected in base.items():
        if exact:
            assert torch.equal(found[name], expected), f"{name}: without the adapter not bit for bit the base"
        else:
            assert_close(found[name], expected)


def _assert_shapes(found: Outputs, reference: Outputs) -> None:
    sizes = [{name: tuple(value.shape) for name, value in outputs.items()} for outputs in (found, reference)]
    assert sizes[0] == sizes[1], f"the outputs are {sizes[0]}, PEFT's are {sizes[1]}"


def _left_alone(subject: _Subject) -> None:
    for name, value in subject.host.state_dict().items():
        same = torch.equal(value, subject.bits[name]) or bool(value.isnan().any())
        assert same, f"the host's {name} changed"


def _ordinary(subject: _Subject, folder: Path, found: Record, ways: Ways) -> Record:
    """Try refused ways again with an adapter on ordinary layers only: is it the layers, or the model?"""
    config = adapting.lora(subject.host, plain=True)
    assert subject.adapted is not None
    if subject.entry.adapter is None and config.target_modules == adapting.lora(subject.host).target_modules:
        return {}
    try:
        _adapt(subject, folder, lambda model: config)
    except _Stop as stop:
        return {"all": stop.record}
    again: Record = {}
    refused = tuple(pair for pair in ways if found[" ".join(pair)]["outcome"] == REFUSED)
    _ways(subject, refused, again)
    return again


# ── Causes ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@contextlib.contextmanager
def _stopping(outcome: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _Stop(outcome, find_cause(error)) from error


def _insist(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _close(one: list[Outputs], other: list[Outputs]) -> bool:
    """Whether two answers differ by rounding alone."""
    try:
        for found, expected in zip(one, other, strict=True):
            _assert_base(found, expected, exact=False)
    except AssertionError:
        return False
    return True


def _same(one: list[Outputs], other: list[Outputs]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


def _timed(work: Callable[[], None]) -> Record:
    begun = time.process_time()
    try:
        work()
    except Exception as error:
        return {"outcome": "cannot", **find_cause(error)}
    return {"outcome": OK, "seconds": round(time.process_time() - begun, 2)}


def find_cause(error: BaseException) -> dict[str, Any]:
    """Class, first line and the innermost lines of an error."""
    innermost = traceback.extract_tb(error.__traceback__)[-3:]
    return {
        "class": type(error).__name__,
        "code": getattr(error, "code", None),
        "message": _first_line(error),
        "lines": [f"{_within(frame.filename)}:{frame.lineno}: {frame.line}" for frame in innermost],
    }


def _first_line(error: BaseException) -> str:
    """Return the first line of an error, and the one that it announces by a colon."""
    lines = str(error).strip().splitlines()
    announced = len(lines) > 1 and lines[0].endswith(":")
    text = " ".join(line.strip() for line in lines[: 1 + announced])[:400]
    return re.sub(r"/[\w./+-]+", lambda path: _within(path[0]), text)


def _within(path: str) -> str:
    """Return a file as its library names it, without where that is installed; of a temporary one the last name."""
    inside = (
        path.replace("\\", "/")
        .rpartition("site-packages/")[2]
        .rpartition("zoo-hosts/")[2]
        .rpartition("/lib/python")[2]
        .removeprefix(str(Path(__file__).parents[2]) + "/")
    )
    return inside.rpartition("/")[2] if inside.startswith(tempfile.gettempdir()) else inside
