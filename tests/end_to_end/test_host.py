"""Compiling leaves the host as it was: bits, flags, mode, hooks, state dict, and the process's random state."""

import random

import numpy as np
import pytest
import torch

import lorac
from lorac.testing import assert_close
from tests.zoo import ZOO

CASES = [
    (
        "eager",
        "live",
        {"a": lorac.LoRA(r=2, targets=["q_proj", "down_proj"]), "b": lorac.DoRA(r=3, targets=["v_proj"])},
    ),
    ("eager", "fused", {"a": lorac.LoRA(r=2, targets=["q_proj"], modules_to_save=["norm"])}),
    ("eager", "baked", {"a": lorac.SHiRA(r=1, targets=["o_proj"])}),
    ("onnxruntime", "live", {"a": lorac.LoRA(r=2, targets=["q_proj"]), "b": lorac.SHiRA(r=1, targets=["o_proj"])}),
    ("onnxruntime", "fused", {"a": lorac.Hydra(r=2, targets=["down_proj"])}),
]


def traits(model):
    """Everything of a model that a user may have set, tensors by identity and by content."""
    modules = {
        path: (
            module.training,
            type(module),
            sorted(name for name in vars(module) if not name.startswith("_")),
            [list(getattr(module, kind).values()) for kind in vars(module) if kind.endswith("_hooks")],
        )
        for path, module in model.named_modules()
    }
    state = {name: (t.data_ptr(), t._version, t.dtype, t.stride()) for name, t in model.state_dict().items()}
    parameters = {name: (id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    return modules, state, parameters, {name: id(b) for name, b in model.named_buffers()}


def draws():
    """The process's random states."""
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()[1].tobytes()


def raw(model, inputs):
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits.numpy().tobytes()


@pytest.mark.slow("the live one, and test_peft_host.py", cases=["onnxruntime-fused--eval", "onnxruntime-live--eval"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("target", "mode", "adapters"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_leaves_the_model_unchanged(target, mode, adapters, training):
    if training and target == "onnxruntime":
        pytest.skip("captured in eval mode; what eager shares with it is tested in both")
    entry = ZOO["tiny_llama"]
    model, inputs = entry.fresh(), entry.inputs()
    before_bits = raw(model, inputs)
    model.model.layers[0].train()  # modes, flags and hooks as nobody would set them
    model.train(training)
    model.model.norm.eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output)
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda module, args: None)
    content = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before, drawn = traits(model), draws()

    active = "a" if mode == "baked" else None
    compiled = lorac.compile(model, adapters, target=target, mode=mode, active=active, dynamic_shapes=None)
    assert traits(model) == before
    assert draws() == drawn
    if mode != "baked":
        with torch.no_grad():
            for tensor in compiled.adapters["a"].parameters():
                tensor.add_(0.05) if tensor.is_floating_point() else None
        compiled.swap("a")
        with torch.no_grad():
            compiled(**inputs)
        compiled.swap(None)
    assert traits(model) == before
    assert draws() == drawn
    for name, tensor in content.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert raw(model.eval(), inputs) == before_bits


@pytest.mark.parametrize("mode", ["live", "fused"])
def test_matches_the_model_without_active_adapters(mode):
    entry = ZOO["tiny_llama"]
    compiled = lorac.compile(entry.model(), {"a": lorac.LoRA(r=2, targets=["q_proj"])}, mode=mode, active=None)
    assert raw(compiled, entry.inputs()) == raw(entry.model(), entry.inputs())


def test_training_the_compiled_model_leaves_the_host():
    """Its optimiser steps reach adapter tensors only."""
    entry = ZOO["tiny_llama"]
    model = entry.fresh()
    content = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = traits(model)
    compiled = lorac.compile(model, {"a": lorac.LoRA(r=2, targets=["q_proj", "v_proj"])})
    compiled.train()
    optimiser = torch.optim.AdamW([p for p in compiled.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        compiled(**entry.inputs(), labels=entry.inputs()["input_ids"]).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert traits(model) == before
    for name, tensor in content.items():
        assert torch.equal(model.state_dict()[name], tensor), name


class Difference(torch.nn.Module):
    """Two inputs, in a container too; it may write into one."""

    def __init__(self, writes=False):
        super().__init__()
        self.first, self.second, self.writes = torch.nn.Linear(4, 6), torch.nn.Linear(4, 6), writes

    def forward(self, x, others):
        if self.writes:
            x.add_(1)
        return self.first(x) - 2 * self.second(others["y"])


@torch.no_grad()
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_one_example_tensor_for_two_arguments_makes_two_inputs(target):
    torch.manual_seed(0)
    model, x = Difference().eval(), torch.randn(3, 4)
    adapters = [lorac.LoRA(r=2, targets=["first"])]
    compiled = lorac.compile(model, adapters, target=target, example_inputs={"x": x, "others": {"y": x}})
    y = torch.randn(3, 4)
    assert_close(compiled(x=x, others={"y": y}), model(x, {"y": y}))
    assert_close(compiled(x=y, others={"y": y}), model(y, {"y": y}))


@pytest.mark.medium("eager", cases=["onnxruntime"])
@torch.no_grad()
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_does_not_write_into_the_example_inputs(target):
    torch.manual_seed(0)
    model, x, y = Difference(writes=True).eval(), torch.randn(3, 4), torch.randn(3, 4)
    kept, example = x.clone(), {"x": x, "others": {"y": y}}
    compiled = lorac.compile(model, [lorac.LoRA(r=2, targets=["first"])], target=target, example_inputs=example)
    assert torch.equal(x, kept)
    assert_close(compiled(x=x.clone(), others={"y": y}), model(x.clone(), {"y": y}))
