"""The tables of the benchmark of TensorRT, as far as they are made without a GPU."""

from __future__ import annotations

import argparse

from benchmarks import _peers_on_gpu as peers
from benchmarks import tensorrt

GIVEN = argparse.Namespace(model="tiny", layers=1, rank=2, dtype="float32", rounds=1)


def test_peft_is_called_and_switched() -> None:
    sides = peers.sides(peers.PEFT, GIVEN, (1, 4), "cpu")
    assert sides.keys() == {"call", "swap"}
    for work in sides.values():
        work()


def test_tabulates_building_and_running() -> None:
    built = {"seconds": 1.0, "cpu": 2.0, "peak": 3.0, "plan": 4.0, "call": 0.5}
    found = {(side,): built for side in tensorrt.SIDES}
    found |= {(tensorrt.REFIT,): {**built, "swap": 0.25}, (peers.PEFT,): {"call": 1.0, "swap": 0.5}}
    building, running = tensorrt.tables(found, GIVEN)
    assert [row[0] for row in building.rows] == [*tensorrt.SIDES, tensorrt.REFIT]
    rows = {row[0]: row[1:] for row in running.rows}
    assert rows[peers.PEFT] == ("1000.000", "250.000", "2.00")
    assert rows["base"] == ("500.000", "–", "1.00")
    (alone,) = tensorrt.tables(
        {key: {k: v for k, v in side.items() if k != "call"} for key, side in found.items() if "plan" in side}, GIVEN
    )
    assert "no GPU here" in alone.notes[0]
