"""The roles of a site's slots that a composed change fills."""

import dataclasses

import pytest
import torch

from lorac import Site, SiteKind
from lorac.ir.algebra import operands
from lorac.ir.algebra.changes import LowRank
from lorac.ir.slots.filling import filled_roles
from lorac.ir.slots.plans import SitePlan

SITE = Site("up", SiteKind.LINEAR, 3, 2, torch.float32, "up.weight", "up.bias")
PAIR = LowRank(torch.randn(2, 1), torch.randn(1, 3))
BESIDE, BOUND = (operands.A, operands.B), (operands.WEIGHT,)


@pytest.mark.parametrize("roles", [BESIDE, BOUND])
def test_a_change_of_the_bias_fills_its_slot_as_well(roles: tuple[str, ...]) -> None:
    plan = SitePlan(SITE, dict.fromkeys([*roles, operands.BIAS], 1))
    assert set(filled_roles(plan, PAIR)) == {*roles}
    assert set(filled_roles(plan, dataclasses.replace(PAIR, e=torch.ones(3)))) == {*roles, operands.BIAS}
    assert filled_roles(plan, None) == ()
