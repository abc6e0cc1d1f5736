"""Adapters that replace a layer by one of another size: classifiers of other labels, other vocabularies."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import lorac
from tests.limits import ROWS
from tests.peft_files import quiet

LABELS = (2, 3, 5, 77)
SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
IDS = torch.arange(3, 31).reshape(4, 7)
TARGETS = ("eager", "onnxruntime")
LIMIT = ROWS[torch.float32]


class Classifiers:
    """A BERT of two labels, adapters of other numbers of labels as PEFT saves them, and PEFT's models of these."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        config = transformers.BertConfig(**SIZES, num_labels=2)
        self.base = transformers.BertForSequenceClassification(config).eval()
        self.folders = {f"c{labels}": folder / f"c{labels}" for labels in LABELS}
        self.models: dict[str | None, Any] = {None: self.base}
        for labels in LABELS:
            host = transformers.BertForSequenceClassification(
                transformers.BertConfig(**SIZES, num_labels=labels)
            ).eval()
            own = {n: t for n, t in self.base.state_dict().items() if not n.startswith("classifier")}
            host.load_state_dict(own, strict=False)
            lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False)
            with quiet():
                model = peft.get_peft_model(host, lora)
                model.save_pretrained(folder / f"c{labels}")
            self.models[f"c{labels}"] = model.eval()

    @torch.no_grad()
    def answer(self, name: str | None, ids: Tensor) -> Tensor:
        """Return PEFT's logits."""
        logits: Tensor = self.models[name](input_ids=ids).logits
        return logits


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Classifiers:
    return Classifiers(tmp_path_factory.mktemp("classifiers"))


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request: pytest.FixtureRequest, classifiers: Classifiers) -> Any:
    return lorac.compile(classifiers.base, dict(classifiers.folders), target=request.param)


def agrees(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).abs().max() <= LIMIT * expected.abs().max())


@torch.no_grad()
def test_each_adapter_answers_with_its_own_labels(compiled: Any, classifiers: Classifiers) -> None:
    for name in classifiers.models:
        for ids in (IDS, IDS[:3, :5]):
            assert agrees(compiled(input_ids=ids, adapters=name).logits, classifiers.answer(name, ids))


@torch.no_grad()
def test_rows_of_several_sizes_end_in_minus_infinity(compiled: Any, classifiers: Classifiers) -> None:
    names = ["c77", "c2", None, "c5"]
    logits = compiled(input_ids=IDS, adapters=names).logits
    assert logits.shape == (4, 77)
    for row, name in enumerate(names):
        expected = classifiers.answer(name, IDS[row : row + 1])[0]
        assert agrees(logits[row][: len(expected)], expected)
        assert (logits[row][len(expected) :] == -math.inf).all()
    assert compiled(input_ids=IDS, adapters=["c2", "c5", "c2", None]).logits.shape == (4, 5)


def test_rejects_mixtures_of_several_sizes(compiled: Any) -> None:
    with pytest.raises(lorac.ChoiceError, match="cannot be mixed at 'classifier': 'c3' has 3, 'c5' has 5 rows"):
        compiled.swap({"c3": 0.5, "c5": 0.5})
    compiled.swap({"c5": 0.5})
    compiled.swap(None)


def test_rejects_labels_where_adapters_have_other_outputs(classifiers: Classifiers) -> None:
    compiled = lorac.compile(classifiers.base, {"c5": classifiers.folders["c5"]})
    with pytest.raises(lorac.InputMismatch, match="labels= cannot be given, since adapters change the number"):
        compiled(input_ids=IDS, labels=torch.zeros(4, dtype=torch.int64))


@torch.no_grad()
def test_a_wider_adapter_is_added_with_the_reserve_that_its_refusal_names(classifiers: Classifiers) -> None:
    compiled = lorac.compile(classifiers.base, {"c3": classifiers.folders["c3"]})
    assert compiled.add_adapter(classifiers.folders["c2"]) == "c2"
    reserve = r"reserve=lorac.Reserve\(outputs=\{'classifier': 77\}\)"
    with pytest.raises(
        lorac.NeedsRecompile, match=f"has 77 rows for 'classifier', and the program at most 3\n.*{reserve}"
    ):
        compiled.add_adapter(classifiers.folders["c77"])
    assert list(compiled.adapters) == ["c3", "c2"]
    wide = lorac.compile(classifiers.base, {}, reserve=lorac.Reserve(outputs={"classifier": 77}))
    wide.add_adapter(classifiers.folders["c77"])
    assert agrees(wide(input_ids=IDS, adapters="c77").logits, classifiers.answer("c77", IDS))
    assert agrees(wide(input_ids=IDS, adapters=None).logits, classifiers.answer(None, IDS))
    with pytest.raises(lorac.SiteError, match="nearest: classifier"):
        lorac.compile(classifiers.base, {}, reserve=lorac.Reserve(outputs={"clasifier": 77}))


@torch.no_grad()
def test_adapters_on_disk_keep_their_sizes(compiled: Any, classifiers: Classifiers, tmp_path: Path) -> None:
    for name, folder in classifiers.folders.items():
        (tmp_path / f"disk-{name}").symlink_to(folder)
    for name in compiled.register(tmp_path):
        logits = compiled(input_ids=IDS, adapters=name).logits
        assert agrees(logits, classifiers.answer(name.removeprefix("disk-"), IDS))
        compiled.remove_adapter(name)


@torch.no_grad()
def test_a_loaded_artifact_keeps_the_sizes(compiled: Any, classifiers: Classifiers, tmp_path: Path) -> None:
    compiled.save(tmp_path / "artifact")
    loaded = lorac.load(tmp_path / "artifact")
    for name in ("c5", None, "c77"):
        assert agrees(loaded(input_ids=IDS, adapters=name).logits, classifiers.answer(name, IDS))
    loaded.remove_adapter("c5")
    loaded.add_adapter(classifiers.folders["c5"])
    assert (loaded(input_ids=IDS, adapters=["c5", "c2", None, "c3"]).logits > -math.inf).sum(1).tolist() == [5, 2, 2, 3]


@pytest.mark.parametrize("target", TARGETS)
@torch.no_grad()
def test_swapped_weights_keep_the_sizes(target: str, classifiers: Classifiers) -> None:
    folders = {name: classifiers.folders[name] for name in ("c5", "c3")}
    compiled = lorac.compile(classifiers.base, folders, target=target, mode="fused", active=None)
    for name in (None, "c3", "c5", None):
        compiled.swap(name)
        assert agrees(compiled(input_ids=IDS).logits, classifiers.answer(name, IDS))


def test_a_head_of_another_size_trains(classifiers: Classifiers) -> None:
    compiled = lorac.compile(classifiers.base, {name: classifiers.folders[name] for name in ("c5", "c77")}, active="c5")
    compiled.train()
    torch.nn.functional.cross_entropy(compiled(input_ids=IDS).logits, torch.tensor([0, 4, 2, 1])).backward()
    compiled.eval()
    found = compiled.adapters["c5"].replaced["classifier.weight"]
    assert found.shape == (5, SIZES["hidden_size"])
    assert found.grad.isfinite().all()
    assert found.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_gives_the_sizes_and_pefts_answers(dtype: torch.dtype, classifiers: Classifiers) -> None:
    folders = {name: classifiers.folders[name] for name in ("c5", "c77")}
    compiled = lorac.compile(classifiers.base, folders, dtype=dtype)
    for name in folders:
        found, expected = compiled(input_ids=IDS, adapters=name).logits, classifiers.answer(name, IDS)
        assert found.shape == expected.shape
        assert (found.float() - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


class Vocabularies:
    """A decoder of 60 tokens, and PEFT's adapters of 64 and 70: embedding and output layer in their place."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.LlamaConfig(**sizes, vocab_size=60, max_position_embeddings=64, eos_token_id=None)
        self.base = transformers.LlamaForCausalLM(config).eval()
        self.folders = {f"v{tokens}": folder / f"v{tokens}" for tokens in (64, 70)}
        self.models: dict[str | None, Any] = {None: self.base}
        for tokens in (64, 70):
            host = transformers.LlamaForCausalLM(copy.deepcopy(config)).eval()
            host.load_state_dict(self.base.state_dict())
            saved = ["embed_tokens", "lm_head"]
            with quiet():
                host.resize_token_embeddings(tokens, mean_resizing=False)
                lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved, init_lora_weights=False)
                model = peft.get_peft_model(host, lora)
                for name, parameter in model.named_parameters():
                    if "modules_to_save" in name:
                        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
                model.save_pretrained(folder / f"v{tokens}")
            self.models[f"v{tokens}"] = model.eval()

    def check(self, compiled: Any) -> None:
        """Compare tokens, also of rows of several vocabularies; some are not the model's."""
        ids = torch.arange(3, 21).reshape(3, 6)
        ids[0, 2], ids[2, 3] = 69, 63
        names = ["v70", None, "v64"]
        found = compiled.generate(ids, adapters=names, max_new_tokens=5, do_sample=False)
        for row, name in enumerate(names):
            own = ids[row : row + 1]
            expected = self.models[name].generate(input_ids=own, max_new_tokens=5, do_sample=False)
            assert torch.equal(found[row : row + 1], expected)
            assert torch.equal(compiled.generate(own, adapters=name, max_new_tokens=5, do_sample=False), expected)
        assert compiled.generate(ids[1:2], adapters=None, max_new_tokens=40, do_sample=True, top_k=0).max() < 60


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Vocabularies:
    return Vocabularies(tmp_path_factory.mktemp("vocabularies"))


@torch.no_grad()
def test_each_adapter_generates_with_its_own_vocabulary(vocabularies: Vocabularies) -> None:
    compiled = lorac.compile(vocabularies.base, dict(vocabularies.folders))
    vocabularies.check(compiled)
    foreign = torch.tensor([[5, 69, 7]])
    assert compiled(input_ids=foreign, adapters="v64").logits[0, 1:].isnan().all()  # which it has no embedding of


@pytest.mark.medium("eager mode, and classifiers on ONNX Runtime, have these sizes")
@pytest.mark.parametrize("mode", ["live", "fused"])
@torch.no_grad()
def test_each_adapter_generates_over_a_cache_with_its_own_vocabulary(mode: str, vocabularies: Vocabularies) -> None:
    folders = dict(vocabularies.folders)
    compiled = lorac.compile(vocabularies.base, folders, target="onnxruntime", cache=True, mode=mode, active=None)
    vocabularies.check(compiled)


@pytest.mark.parametrize("target", [TARGETS[0], pytest.param(TARGETS[1], marks=pytest.mark.medium("eager shows it"))])
@torch.no_grad()
def test_twenty_classifiers_of_2_to_77_labels_share_a_call(
    target: str, classifiers: Classifiers, tmp_path: Path
) -> None:
    adapters, hosts = {}, {}
    for number in range(20):
        labels = 2 + round(number * 75 / 19)
        own = lorac.load_adapter(classifiers.folders["c77"], classifiers.base, name=f"n{number}")
        for name, tensor in own.replaced.items():
            own.replaced[name] = torch.randn(labels, *tensor.shape[1:])
        adapters[own.name], hosts[own.name] = own, labels
    compiled = lorac.compile(classifiers.base, adapters, target=target)
    ids = IDS.repeat(5, 1)
    logits = compiled(input_ids=ids, adapters=list(adapters)).logits
    assert logits.shape == (20, 77)
    for row, (name, labels) in enumerate(hosts.items()):
        host = classifiers.models["c77"].base_model.model
        pooled = host.bert(input_ids=ids[row : row + 1]).pooler_output
        expected = torch.nn.functional.linear(pooled, *reversed([*adapters[name].replaced.values()]))[0]
        assert agrees(logits[row, :labels], expected)
        assert (logits[row, labels:] == -math.inf).all()


@torch.no_grad()
def test_a_reserve_may_be_wider_than_the_adapters(classifiers: Classifiers) -> None:
    reserve = lorac.Reserve(outputs={"classifier": 77})
    compiled = lorac.compile(classifiers.base, {"c3": classifiers.folders["c3"]}, reserve=reserve)
    compiled.add_adapter(classifiers.folders["c77"])
    for name in ("c3", "c77", None):
        assert agrees(compiled(input_ids=IDS, adapters=name).logits, classifiers.answer(name, IDS))


@pytest.mark.parametrize("reserve", [None, lorac.Reserve(outputs={"classifier": 3})])
@torch.no_grad()
def test_a_host_keeps_outputs_that_no_adapter_has(reserve: lorac.Reserve | None, classifiers: Classifiers) -> None:
    host = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=5)).eval()
    adapter = lorac.load_adapter(classifiers.folders["c2"], classifiers.base, name="c2")
    compiled = lorac.compile(host, {"c2": adapter} if reserve is None else {}, reserve=reserve)
    assert agrees(compiled(input_ids=IDS, adapters=None).logits, host(input_ids=IDS).logits)
    if reserve is None:
        assert compiled(input_ids=IDS, adapters=["c2", None, "c2", None]).logits.shape == (4, 5)


def test_rejects_a_lora_on_a_layer_that_others_resize(classifiers: Classifiers) -> None:
    own = lorac.LoRA(r=2, targets=["classifier"])
    with pytest.raises(lorac.AdapterError, match=r"'own' changes 'classifier', which other .*\n.*modules_to_save"):
        lorac.compile(classifiers.base, {"own": own, "c5": classifiers.folders["c5"]})


@pytest.mark.parametrize("target", TARGETS)
@torch.no_grad()
def test_the_head_of_a_resized_tied_embedding_keeps_its_size(target: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=60, tie_word_embeddings=True)
    base = transformers.LlamaForCausalLM(config).eval()
    method = lorac.LoRA(r=2, targets=["q_proj"], modules_to_save=["embed_tokens"])
    adapter = lorac.compile(base, {"wide": method}).adapters["wide"]
    adapter.replaced["model.embed_tokens.weight"] = rows = torch.randn(70, 16)
    compiled = lorac.compile(base, {"wide": adapter}, target=target)
    ids = torch.tensor([[3, 69, 5, 61]])
    hidden = base.model(inputs_embeds=torch.nn.functional.embedding(ids, rows)).last_hidden_state
    assert agrees(compiled(input_ids=ids, adapters="wide").logits, base.lm_head(hidden))
    assert agrees(compiled(input_ids=ids[:, :1], adapters=None).logits, base(ids[:, :1]).logits)
    later = lorac.LoRA(r=2, targets=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    both = lorac.compile(base, {"both": later}).adapters["both"]
    both.replaced |= dict.fromkeys(both.replaced, rows)
    compiled.add_adapter(both)
    assert agrees(compiled(input_ids=ids, adapters="both").logits, torch.nn.functional.linear(hidden, rows))
