"""MeteoRA's gates, trained on three LoRAs (prose, code, digits), send nine tokens of ten to the right one."""

import pytest

from experiments.meteora_gates import STEPS, study


@pytest.mark.slow
def test_gates_find_the_lora_of_a_tokens_kind():
    found = study(0, STEPS)
    assert found.right >= 0.9 and min(found.by_kind.values()) >= 0.8
    assert found.losses["its own LoRA"] <= found.losses["routed"] < found.losses["base"]
