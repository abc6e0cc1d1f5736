"""The gate: softmax over the k chosen, ties to the lowest index, the same in eager and in ONNX Runtime."""

import onnxruntime as ort
import pytest
import torch

from lorac.testing import assert_close
from lorac.variants._mixtures import top_k_mask, top_k_softmax
from tests.limits import decimals

Z = torch.tensor([1.0, 3.0, 2.0, -1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("temperature", "weights"), [(1, (0.731059, 0.268941)), (15, (0.516660, 0.483340)), (30, (0.508333, 0.491667))]
)
def test_the_hand_computed_weights(temperature, weights):
    found = top_k_softmax(Z, 2, temperature)
    assert decimals(found, 6) == [0, *weights, 0]
    assert found[0] == 0 and found[3] == 0


@pytest.mark.parametrize("k", [1, 2, 5])
def test_equals_top_k_then_softmax_without_ties(k):
    z = torch.randn(3, 7, 5, dtype=torch.float64)
    values, indices = torch.topk(z, k)
    expected = torch.zeros_like(z).scatter(-1, indices, values.softmax(-1))
    assert_close(top_k_softmax(z, k), expected)
    assert_close(top_k_softmax(z, k).sum(-1), torch.ones(3, 7, dtype=torch.float64))


def test_a_huge_logit_takes_all():
    z = Z.clone()
    z[3] = 1e4
    assert top_k_softmax(z, 2).tolist() == [0, 0, 0, 1]


def test_only_chosen_logits_get_a_gradient():
    z = Z.clone().requires_grad_()
    top_k_softmax(z, 2)[1].backward()
    assert z.grad is not None and z.grad[0] == 0 and z.grad[3] == 0 and z.grad[1] > 0 > z.grad[2]


TIES = torch.tensor([[0.0, 0, 0, 0], [1, 0, 1, 1], [-1, 2, -1, 2], [0, -0.0, 0, -0.0], [5, 5, 7, 5]])
FIRST_TWO = [[0, 1], [0, 2], [1, 3], [0, 1], [0, 2]]


def test_ties_go_to_the_lowest_index():
    assert [row.nonzero().flatten().tolist() for row in top_k_mask(TIES, 2)] == FIRST_TWO


@pytest.mark.medium("backends/onnxruntime/test_top_k.py")
@pytest.mark.slow("two of the best", keep=["2"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_onnx_runtime_breaks_ties_as_eager(k, tmp_path):
    class Gate(torch.nn.Module):
        def forward(self, z):
            return top_k_softmax(z, k, 2.0)

    program = torch.export.export(Gate(), (TIES,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    emitted = torch.onnx.export(program, dynamo=True, verbose=False)
    assert emitted is not None
    emitted.save(str(tmp_path / "gate.onnx"))
    session = ort.InferenceSession(str(tmp_path / "gate.onnx"))
    z = torch.cat([TIES, torch.zeros(40, 4)])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: z.numpy()})[0])
    assert torch.equal(found != 0, top_k_softmax(z, k, 2.0) != 0)
    assert_close(found, top_k_softmax(z, k, 2.0))
