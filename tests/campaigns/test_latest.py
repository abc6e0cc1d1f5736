"""The versions that `make latest` installs, and its grouping of failures."""

from __future__ import annotations

from campaigns.latest import ROOT, causes, requirements

PROJECT = """
[project]
name = "it"
dependencies = ["numpy>=2.0", "torch>=2.11,<2.14"]
[project.optional-dependencies]
hf = ["accelerate>=1.10"]
dev = ["it[hf]", "ruff==0.17.*", "rt>=1.7,<2; sys_platform != 'darwin'"]
other = ["left-out>=1"]
"""
REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="one"><failure message="off by 0.25 at 0x7f">…</failure></testcase>
<testcase classname="tests.a" name="two"/>
<testcase classname="tests.b" name="three"><error message="no module named x"/></testcase>
<testcase classname="tests.b" name="four"><failure message="off by 0.5 at 0x80">…</failure></testcase>
</testsuite></testsuites>"""


def test_requirements_have_no_upper_bounds() -> None:
    assert requirements(PROJECT, "dev") == [
        "numpy>=2.0",
        "torch>=2.11",
        "ruff>=0.17",
        "rt>=1.7; sys_platform != 'darwin'",
        "accelerate>=1.10",
    ]


def test_every_requirement_of_this_project_has_a_lowest_version() -> None:
    found = requirements((ROOT / "pyproject.toml").read_text(), "dev")
    assert [requirement for requirement in found if ">=" not in requirement] == []
    assert [requirement for requirement in found if "<" in requirement] == []


def test_groups_failures_by_their_message() -> None:
    assert causes(REPORT) == [
        ("off by N at N", ["tests.a::one", "tests.b::four"]),
        ("no module named x", ["tests.b::three"]),
    ]
