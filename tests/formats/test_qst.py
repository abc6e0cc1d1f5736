"""QST's folders, as its authors' code writes them, against the results of that code."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import lorac
from tests.formats.oracle import assert_equal
from tests.parity import assert_parity
from tests.refusing import refuses


class SideNetwork(nn.Module):
    """``QSTLlamaModel`` and the end of ``QSTLlamaForCausalLM``, over transformers' own layers."""

    def __init__(self, model: nn.Module, r: int, bottleneck: int) -> None:
        super().__init__()
        config = copy.deepcopy(model.config)
        d, h = config.hidden_size, config.hidden_size // r
        config.hidden_size, config.intermediate_size, config.head_dim = h, config.intermediate_size // r, None
        config = transformers.LlamaConfig(**{k: v for k, v in config.to_dict().items() if k != "head_dim"})
        config._attn_implementation = "eager"
        modeling = transformers.models.llama.modeling_llama
        count = config.num_hidden_layers
        self.qst_layers = nn.ModuleList(modeling.LlamaDecoderLayer(config, i) for i in range(count))
        self.downsample = nn.ModuleList(Downsample(d, bottleneck, h) for _ in range(count))
        self.z = nn.ParameterList(nn.Parameter(torch.full((h,), 0.5)) for _ in range(count))
        self.norm_qst = modeling.LlamaRMSNorm(h, eps=config.rms_norm_eps)
        self.rotary, self.upsample = modeling.LlamaRotaryEmbedding(config), nn.Linear(h, d)
        self.lm_head_z = nn.Parameter(torch.ones(d))

    def forward(self, model: nn.Module, ids: Tensor) -> Tensor:
        hidden = model.model(ids, output_hidden_states=True)
        seen: list[Tensor] = []
        hooks = [layer.register_forward_hook(lambda *a: seen.append(a[2])) for layer in model.model.layers]
        last = model.model(ids).last_hidden_state
        for hook in hooks:
            hook.remove()
        first, positions = hidden.hidden_states[0], torch.arange(ids.shape[1])[None]
        mask = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=first.dtype).triu(1)[None, None]
        g = self.downsample[0](first)
        for n, h in enumerate(seen):
            z = torch.sigmoid(self.z[n])
            g = (1 - z) * self.downsample[n](h) + z * g
            tables = self.rotary(g, positions)
            g = self.qst_layers[n](g, attention_mask=mask, position_ids=positions, position_embeddings=tables)
        z = torch.sigmoid(self.lm_head_z)
        return model.lm_head((1 - z) * self.upsample(self.norm_qst(g)) + z * last)

    def save(self, folder: Path) -> None:
        """``save_qst_state``."""
        parts = {"layers": self.qst_layers, "z": self.z, "downsample": self.downsample, "norm": self.norm_qst}
        for name, part in {**parts, "upsample": self.upsample}.items():
            torch.save(part.state_dict(), folder / f"qst_{name}_parameters.pt")
        torch.save(self.lm_head_z, folder / "lm_head_z_path.pt")


class Downsample(nn.Module):
    """``AdapterLinear`` of the authors' code, with the activation and norm of its runs."""

    def __init__(self, inputs: int, r: int, outputs: int) -> None:
        super().__init__()
        self.adapter_A, self.adapter_B = nn.Linear(inputs, r, bias=False), nn.Linear(r, outputs, bias=False)
        self.post_layer_norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.post_layer_norm(self.adapter_B(F.silu(self.adapter_A(x))))


@pytest.fixture(scope="module")
def qst(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, SideNetwork, Path]:
    """Return a Llama, the authors' side network of it away from its start, and the folder that they save."""
    folder = tmp_path_factory.mktemp("qst")
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    model = transformers.LlamaForCausalLM(config).eval()
    side = SideNetwork(model, r=4, bottleneck=3).eval()
    for parameter in side.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    side.save(folder)
    return model, side, folder


@torch.no_grad()
def test_qst_matches_its_authors_layers(qst: tuple[nn.Module, SideNetwork, Path], tmp_path: Path) -> None:
    model, side, folder = qst
    ids = torch.randint(0, 61, (2, 7))
    adapter = lorac.load_adapter(folder, model)
    compiled = lorac.compile(model, {"a": adapter})
    assert_parity(compiled(input_ids=ids).logits, side(model, ids), model(input_ids=ids).logits)
    lorac.save_adapter(adapter, tmp_path / "again", "qst", model)
    again = lorac.load_adapter(tmp_path / "again", model, name=adapter.name)
    assert_equal(again, adapter)
    assert again.variant == adapter.variant


def test_rejects_qst_folders_that_do_not_fit_a_llama(qst: tuple[nn.Module, SideNetwork, Path], tmp_path: Path) -> None:
    model, _, folder = qst
    with refuses("base_needed", match="heads"):
        lorac.load_adapter(folder)
    shutil.copytree(folder, tmp_path / "it")
    file = tmp_path / "it" / "lm_head_z_path.pt"
    for wrong, match in ((torch.ones(31), r"z_path\.pt' has the shape"), ({"weight": torch.ones(32)}, "dense tensor")):
        torch.save(wrong, file)
        with refuses("corrupt_file", match=match):
            lorac.load_adapter(tmp_path / "it", model)
    file.rename(tmp_path / "it" / "lm_head_z_parameters.pt")  # OPT's name
    with refuses("corrupt_file", match=r"lacks lm_head_z_path\.pt"):
        lorac.load_adapter(tmp_path / "it", model)
    own = lorac.compile(model, {"a": lorac.QST.of(model, r=4)}).adapters["a"]
    with refuses("unsupported_field", match="cannot store own_first=True"):
        lorac.save_adapter(own, tmp_path / "own", "qst", model)


@pytest.mark.parametrize("format", ["kohya", "adapterhub"])
def test_rejects_saving_methods_of_whole_modules_in_formats_of_layers(
    format: str, qst: tuple[nn.Module, SideNetwork, Path], tmp_path: Path
) -> None:
    model, _, folder = qst
    adapter = lorac.load_adapter(folder, model)
    with refuses("unsupported_field", match="qst"):
        lorac.save_adapter(adapter, tmp_path / "a", format, model)
    with refuses("adapter_error", match="is not LoRA\n.*edits weights"):
        lorac.resize(adapter, 1)
