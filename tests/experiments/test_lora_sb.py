"""LoRA-SB next to LoRA-XS: what the tables decide, and that the command runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from experiments import lora_sb


def test_what_separates_is_told_from_what_does_not() -> None:
    xs = torch.tensor([[2.0, 2.0], [2.1, 2.0], [2.2, 2.1]])
    text = lora_sb.verdict(xs, xs - torch.tensor([[0.5, 0.9], [0.5, -0.5], [0.6, 0.1]]))
    assert text == "LoRA-SB is below at 2 of 2 steps, by more than two standard errors at 1; at 1 they do not separate"
    assert lora_sb.verdict(xs, xs - 0.5).endswith("by more than two standard errors at 2")
    assert lora_sb.spread([torch.tensor([2.0, 4.0]), torch.tensor([3.0, 4.5])]) == 0.25


@pytest.mark.slow
def test_it_runs_and_alpha_is_nothing_to_lora_sb(capsys: Any) -> None:
    lora_sb.main(["--smoke"])
    said = capsys.readouterr().out
    assert "against LoRA-XS, 2 seeds, 2 steps" in said
    row = next(line for line in said.splitlines() if line.strip().startswith("LoRA-SB SGD"))
    assert float(row.split()[-1]) <= lora_sb.FLAT
