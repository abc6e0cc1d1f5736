"""Choices of adapters, in one canonical spelling."""

import math

import pytest

import lorac
from lorac import Active
from lorac.ir.slots.choice import choice_strengths, describe_choice, parse_choice

KNOWN = ("sql", "mine", "style")


@pytest.mark.parametrize(
    ("spec", "choice"),
    [
        (None, ()),
        ({}, ()),
        ("sql", (("sql", Active(1.0)),)),
        ({"sql": 1}, (("sql", Active(1.0)),)),
        ({"sql": 0.7, "mine": 0.3}, (("mine", Active(0.3)), ("sql", Active(0.7)))),
        ({"mine": 0.3, "sql": 0.7}, (("mine", Active(0.3)), ("sql", Active(0.7)))),
        ({"sql": 0.0, "mine": -2}, (("mine", Active(-2.0)),)),
        ({"sql": Active(0.5, rank=4)}, (("sql", Active(0.5, rank=4)),)),
    ],
)
def test_canonical(spec, choice):
    assert parse_choice(spec, KNOWN) == choice


def test_spelling():
    choice = parse_choice({"sql": 0.7, "mine": 0.3}, KNOWN)
    assert choice_strengths(choice) == {"mine": 0.3, "sql": 0.7}
    assert parse_choice(choice_strengths(choice), KNOWN) == choice
    assert describe_choice(choice) == "mine*0.3, sql*0.7"
    assert describe_choice(()) == "none"


@pytest.mark.parametrize("spec", ["sq", {"sq": 1.0}, {"sq": 0.0}])
def test_an_unknown_name(spec):
    with pytest.raises(lorac.AdapterNotFound, match="no adapter is called 'sq'\n  nearest: sql"):
        parse_choice(spec, KNOWN)


@pytest.mark.parametrize(
    "spec",
    [
        3,
        ["sql"],
        {"sql": "1"},
        {"sql": None},
        {"sql": True},
        {"sql": math.nan},
        {"sql": math.inf},
        {"sql": Active(math.nan)},
        {"sql": Active(rank=0)},
    ],
    ids=repr,
)
def test_no_choice(spec):
    with pytest.raises(lorac.ChoiceError):
        parse_choice(spec, KNOWN)
