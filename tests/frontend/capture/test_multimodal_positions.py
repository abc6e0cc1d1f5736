"""Positions of text with images in it: inputs of a program that the model makes itself where a call leaves them out."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

import lorac
from lorac.frontend.host import Host
from lorac.testing import assert_close


class Grouping(PreTrainedModel):
    """Groups the kinds of its tokens to find positions: those of an image are all the same."""

    config_class = PretrainedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed, self.linear = nn.Embedding(20, 6), nn.Linear(6, 5)

    def get_rope_index(
        self, input_ids: Tensor, mm_token_type_ids: Tensor, image_grid_thw: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        rows = []
        for kinds in mm_token_type_ids.tolist():
            groups = [(kind, len(list(group))) for kind, group in itertools.groupby(kinds)]
            places = itertools.chain.from_iterable(
                range(n) if kind == 0 else [self.config.seen] * n for kind, n in groups
            )
            rows.append(list(places))
        return torch.tensor(rows).expand(3, -1, -1), None

    def forward(
        self,
        input_ids: Tensor,
        mm_token_type_ids: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        if position_ids is None:
            position_ids = self.get_rope_index(input_ids, mm_token_type_ids, image_grid_thw)[0]
        answer: Tensor = self.linear(self.embed(input_ids) * position_ids.sum(0)[..., None])
        return answer


def _call(rows: int, length: int) -> dict[str, Tensor]:
    ids = torch.arange(rows * length).reshape(rows, length) % 20
    return {"input_ids": ids, "mm_token_type_ids": (ids % 5 == 1).long(), "image_grid_thw": torch.ones(rows, 3).long()}


@pytest.fixture(scope="module")
def host() -> Grouping:
    torch.manual_seed(0)
    return Grouping(PretrainedConfig(seen=7)).eval()


@pytest.fixture(scope="module")
def compiled(host: Grouping) -> Any:
    adapters = {"a": lorac.LoRA(r=2, targets=["linear"])}
    return lorac.compile(host, adapters, target="onnxruntime", active=None, example_inputs=_call(2, 7))


def test_they_are_made_without_the_models_weights(host: Grouping):
    positions = Host.of(host).find_positions()
    assert positions is not None
    assert {p.device.type for p in positions._owner.parameters()} == {"meta"}
    made = positions.compute({name: value.numpy() for name, value in _call(2, 7).items()})
    assert made is not None
    assert torch.equal(made, host.get_rope_index(**_call(2, 7))[0])
    assert all(p.device.type == "cpu" for p in host.parameters())


def test_makes_no_positions_for_text_and_other_models(host: Grouping):
    positions = Host.of(host).find_positions()
    assert positions is not None
    assert positions.compute({"input_ids": torch.zeros(2, 3)}) is None
    assert Host.of(nn.Linear(2, 2)).find_positions() is None


def test_a_call_that_leaves_them_out_gets_the_models(compiled: Any, host: Grouping):
    for rows, length in ((2, 7), (3, 11)):
        call = _call(rows, length)
        assert_close(compiled(**call), host(**call).detach())
        given = {**call, "position_ids": host.get_rope_index(**call)[0] + 1}
        assert_close(compiled(**given), host(**given).detach())


def test_a_loaded_program_says_how_to_make_positions(compiled: Any, host: Grouping, tmp_path: Path):
    compiled.save(tmp_path / "it.lorac")
    loaded, call = lorac.load(tmp_path / "it.lorac"), _call(3, 5)
    with pytest.raises(
        lorac.ChoiceError, match=r"'position_ids'\n.*get_rope_index\(input_ids, mm_token_type_ids, image"
    ):
        loaded(**call)
    assert_close(loaded(**call, position_ids=host.get_rope_index(**call)[0]), host(**call).detach())


def test_rejects_unsupported_arguments_by_name(compiled: Any):
    with pytest.raises(lorac.InputMismatch, match=r"get_rope_index\(\) finds no position_ids: AttributeError"):
        compiled(**{**_call(2, 7), "mm_token_type_ids": 3})
