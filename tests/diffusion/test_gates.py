"""AutoLoRA's gates: the third expert, LoRAs that are exchanged under one set of gates, and their training."""

import pytest
import torch
from torch import nn

import lorac
from lorac.diffusion.gates import GateSettings, global_expert, read_gates, train_gates, write_loras
from lorac.testing import assert_close
from tests.parity import assert_parity
from tests.refusing import refuses

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))


def host():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)).eval()


def lora(seed, *, rank=2, paths=("0", "2")):
    made = lorac.compile(host(), {f"l{seed}": lorac.LoRA(r=rank, alpha=3.0, targets=paths)}).adapters[f"l{seed}"]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.25)
    return made


LORAS = [lora(seed) for seed in range(4)]


@torch.no_grad()
def test_the_global_expert_is_the_nearest_of_its_rank():
    summed = {
        path: sum(1.5 * one.tensors[path]["lora_B"] @ one.tensors[path]["lora_A"] for one in LORAS[:2])
        for path in ("0", "2")
    }
    for rank in (4, 2):
        found = lorac.factors(global_expert(*LORAS[:2], rank=rank))
        for path, total in summed.items():
            u, s, v = torch.linalg.svd(total, full_matrices=False)
            assert_close((found[path].a @ found[path].b).mT, u[:, :rank] * s[:rank] @ v[:rank])


@pytest.mark.medium("gates that learn")
@torch.no_grad()
def test_other_loras_are_written_under_the_same_gates():
    model = host()
    gated = lorac.AutoLoRA.from_loras(LORAS[:3])
    compiled = lorac.compile(model, {"gates": gated})
    others = [lora(7, rank=1, paths=("2",)), LORAS[3], LORAS[0]]
    before = compiled(X)
    write_loras(compiled.adapters["gates"], others)
    fresh = lorac.AutoLoRA.from_loras(others, gates=read_gates(gated))
    found = compiled(X)
    assert_parity(found, lorac.compile(model, {"gates": fresh})(X), model(X))
    assert not torch.equal(found, before)
    with refuses("shape_mismatch", match="fuses 3 LoRAs of rank 2 .* these are 2 of rank 2"):
        write_loras(gated, LORAS[:2])
    with refuses("shape_mismatch", match="one adapts '2'"):
        write_loras(lorac.AutoLoRA.from_loras([lora(1, paths=("0",))]), [LORAS[0]])


def test_gates_alone_learn_and_the_loss_falls():
    model = host()
    wanted = [lorac.compile(model, {one.name: one})(X).detach() for one in LORAS[:3]]
    adapter = lorac.AutoLoRA.from_loras([*LORAS[:2], global_expert(*LORAS[:2])], base=False)
    compiled = lorac.compile(model, {"gates": adapter})
    bases = [p.detach().clone() for p in model.parameters()]
    seen = []

    def error(prompt, image, generator):
        seen.append((prompt, image))
        return (compiled(X) - wanted[image]).square().mean()

    settings = GateSettings(steps=60, rate=2e-2, margin=0.0)
    losses = train_gates(compiled, "gates", LORAS[:3], error, settings)
    assert sum(losses[-10:]) < sum(losses[:10])
    assert all(torch.equal(p, before) for p, before in zip(model.parameters(), bases, strict=True))
    own, other = seen[::2], seen[1::2]
    assert {prompt for prompt, _ in own} == {None, 0, 1, 2}
    assert all(prompt in (None, image) for prompt, image in own)
    assert all(prompt != image == first for (prompt, image), (_, first) in zip(other, own, strict=True))


def test_transfers_gates_to_other_loras():
    trained = lorac.AutoLoRA.from_loras(LORAS[:3], base=False, seed=3)
    found = lorac.AutoLoRA.from_loras(LORAS[1:], gates=read_gates(trained))
    assert found.variant.base is False
    for path, own in trained.tensors.items():
        assert all(torch.equal(found.tensors[path][key], own[key]) for key in own if not key.startswith("lora_"))


def test_rejects_too_few_loras_and_wrong_settings():
    compiled = lorac.compile(host(), {"gates": lorac.AutoLoRA.from_loras(LORAS[:3])})
    with refuses("choice_error", match="on pairs of LoRAs"):
        train_gates(compiled, "gates", LORAS[:1], lambda *given: X.sum())
    with pytest.raises(lorac.OptionError):
        GateSettings(steps=0)
