"""A prepared adapter lies in a few blocks of memory, and is the same."""

from __future__ import annotations

import torch

from lorac import Adapter, LoRA
from lorac.adapters.preparation import pack_adapter
from lorac.ir.algebra.changes import Delta, LowRank
from lorac.ir.algebra.operands import C
from lorac.ir.slots.plans import PreparedAdapter
from lorac.ir.slots.stacks import find_stacks


def test_packs_tensors_of_equal_shape_in_sequence() -> None:
    own, shared, delta = torch.randn(3, 5), torch.randn(7, 2), torch.randn(4, 4)
    changes = {str(i): LowRank(torch.randn(7, 3), torch.randn(3, 5), {C: torch.randn(5)}) for i in range(3)}
    changes["own"] = LowRank(torch.randn(7, 3), own)
    changes |= {name: LowRank(shared.detach(), torch.randn(2, 5), e=torch.randn(5)) for name in ("x", "y")}
    stored = torch.randn(3, 7)
    changes["3"] = LowRank(stored.t(), torch.randn(3, 5), {C: torch.randn(5)})
    adapter = Adapter("a", LoRA(r=3), {"own": {"b": own, "a": stored}})
    others = {"delta": Delta(delta), "turned": Delta(delta.t())}
    packed = pack_adapter(PreparedAdapter({**changes, **others}, truncatable=0.5), adapter)

    assert packed.truncatable == 0.5
    for path, before in changes.items():
        after = packed.changes[path]
        assert isinstance(after, LowRank)
        for name in ("a", "b"):
            assert torch.equal(getattr(after, name), getattr(before, name))
        assert (after.e is None) == (before.e is None)
        assert after.scales.keys() == before.scales.keys()
        assert all(torch.equal(after.scales[name], scale) for name, scale in before.scales.items())
    low_rank = [packed.changes[path] for path in changes]
    assert len(find_stacks([change.a for change in [*low_rank[:4], packed.changes["3"]]])) == 1
    assert len(find_stacks([change.b for change in low_rank[:3]])) == 1
    assert len(find_stacks([change.scales[C] for change in low_rank[:3]])) == 1
    assert packed.changes["own"].b is own
    assert packed.changes["x"].a.data_ptr() == packed.changes["y"].a.data_ptr() == shared.data_ptr()
    assert packed.changes["delta"].delta is delta
    assert packed.changes["turned"].delta.is_contiguous()
