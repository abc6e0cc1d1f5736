"""AutoLoRA's retrieval: its loss by hand, the weights that a vector depends on, and adapters found unseen."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from typer.testing import CliRunner

import lorac
from lorac.cli import app
from lorac.diffusion.retrieval import Retriever, find_adapters, matching_loss, train_retriever
from lorac.diffusion.weight_encoder import ClipBlock, WeightEncoder, find_sizes
from lorac.testing import assert_close
from tests.diffusion.texts import make_encoder, make_tokenizer
from tests.limits import assert_apart, decimals
from tests.refusing import refuses

WORDS = ("red dress", "blue boat", "green hat", "old tower", "small dog", "tall tree", "wet road", "new moon")
PATHS = ("blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down")
SIZES = {path: (6, 5) if path.endswith("up") else (5, 6) for path in PATHS}


# ── The loss ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_loss():
    assert decimals(matching_loss(torch.eye(2), torch.eye(2)), 4) == [6.2652]
    alike = F.normalize(torch.ones(32, 4), dim=-1)
    assert decimals(matching_loss(alike, alike), 3) == [round(20 * math.log(32), 3)]
    assert decimals(matching_loss(torch.eye(32), torch.eye(32)), 3) == [50.361]


# ── The encoder ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_flux_has_304_tokens_of_13_kinds():
    double = [f"{layer}_{side}" for side in "ab" for layer in ("to_qkv", "to_out", "ff0", "ff2", "norm1")]
    sizes = {f"blocks.{n}.{layer}": (2, 3) for n in range(19) for layer in double}
    sizes |= {f"single_blocks.{n}.{layer}": (2, 3) for n in range(38) for layer in ("to_qkv_mlp", "proj_out", "norm")}
    encoder = WeightEncoder(sizes, 4)
    assert encoder.position_embeds.shape == (1, 304, 4)
    projections = WeightEncoder(sizes, 4, probes=2).state_dict()
    assert projections["embedder.proj_dict.blocks___to_qkv_a___3.weight"].shape == (4, 2 * 3)
    names = encoder.state_dict()
    assert sum(name.startswith("embedder.proj_dict.") and name.endswith("weight") for name in names) == 13
    assert "embedder.model_dict.blocks___0___to_qkv_a.x" in names and "encoders.1.self_attn.q_proj.weight" in names


@torch.no_grad()
def test_a_block_is_clips_own():
    config = CLIPTextConfig(hidden_size=128, intermediate_size=512, num_attention_heads=2, hidden_act="quick_gelu")
    config._attn_implementation = "eager"
    theirs, ours = CLIPEncoderLayer(config).eval(), ClipBlock(128)
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.randn(2, 5, 128)
    causal = torch.full((5, 5), -torch.inf).triu(1)[None, None]
    wanted = theirs(hidden, attention_mask=causal)
    assert_close(ours(hidden), wanted[0] if isinstance(wanted, tuple) else wanted)


def adapter(concept, seed, *, rank=3, paths=PATHS):
    """A LoRA of a concept: the concept's own change of every site and a share of chance, in factors of chance."""
    own = torch.Generator().manual_seed(concept)
    other = torch.Generator().manual_seed(1000 * seed + concept + 1)
    tensors = {}
    for path in PATHS:
        takes, gives = SIZES[path]
        a, b = torch.randn(2, takes, generator=own), torch.randn(gives, 2, generator=own)
        a = torch.cat([a, 0.4 * torch.randn(rank - 2, takes, generator=other)])
        b = torch.cat([b, 0.4 * torch.randn(gives, rank - 2, generator=other)], dim=1)
        turn = torch.eye(rank) + 0.3 * torch.randn(rank, rank, generator=other)
        tensors[path] = {"lora_A": turn @ a, "lora_B": b @ torch.linalg.inv(turn)}
    chosen = {path: tensors[path] for path in paths}
    return lorac.Adapter(f"{WORDS[concept]} {seed}", lorac.LoRA(r=rank, alpha=rank, targets=tuple(paths)), chosen)


@torch.no_grad()
def test_a_vector_depends_on_the_changes_alone():
    encoder, given = WeightEncoder(SIZES, 32), adapter(0, 0)
    turned = {
        path: {"lora_A": 2 * own["lora_A"].flip(0), "lora_B": own["lora_B"].flip(1) / 2}
        for path, own in given.tensors.items()
    }
    other = lorac.Adapter("other", given.variant, turned)
    one, same, different = encoder(encoder.stack_pairs([given, other, adapter(1, 0)]))
    assert_close(same, one)
    assert_apart(different, one)


@torch.no_grad()
def test_a_second_probe_reads_more_of_the_weights():
    given = adapter(0, 0)
    for probes in (1, 2):
        encoder = WeightEncoder(SIZES, 32, probes=probes)
        pairs = encoder.stack_pairs([given, given])
        for path, (a, b) in pairs.items():
            x = encoder.get_submodule(f"embedder.model_dict.{path.replace('.', '___')}").x[0, 0]
            a.sub_(torch.outer(x, x / x.square().sum()) @ a)
            b[1] = 0
        hidden, none = encoder(pairs)
        (assert_close if probes == 1 else assert_apart)(hidden, none)


@torch.no_grad()
def test_sites_that_an_adapter_lacks_count_as_unchanged():
    encoder = WeightEncoder(SIZES, 32)
    pairs = encoder.stack_pairs([adapter(0, 0, paths=PATHS[1:])])
    assert not pairs[PATHS[0]][0].any() and pairs[PATHS[1]][0].any()
    assert find_sizes([adapter(0, 0)]) == dict(sorted(SIZES.items()))
    elsewhere = WeightEncoder({"blocks.0.up": (6, 5)}, 32)
    with refuses("site_not_found", match="not made for 'blocks.0.down' .5 inputs, 6 outputs"):
        elsewhere.stack_pairs([adapter(0, 0)])


# ── Finding ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    torch.manual_seed(0)
    made = Retriever(
        WeightEncoder(SIZES, 32, probes=2), make_encoder(), make_tokenizer(tmp_path_factory.mktemp("tokenizer")), "mean"
    )
    pairs = [((words, f"a {words}"), adapter(n, seed)) for n, words in enumerate(WORDS) for seed in range(5)]
    losses = train_retriever(made, pairs, steps=150, rate=2e-3)
    assert losses[-1] < losses[0]
    return made


@pytest.mark.medium("test_a_folder_is_searched_by_a_stored_retriever")
def test_adapters_that_were_never_seen_are_found(retriever):
    unseen = [adapter(n, seed) for n in range(len(WORDS)) for seed in (7, 8)]
    scores = retriever.embed_prompts([f"a {words}" for words in WORDS]) @ retriever.embed_adapters(unseen).mT
    assert float((scores.argmax(1) // 2 == torch.arange(len(WORDS))).float().mean()) >= 0.9


@pytest.fixture(scope="module")
def folder(retriever, tmp_path_factory):
    found = tmp_path_factory.mktemp("adapters")
    for n, words in enumerate(WORDS):
        lorac.save_adapter(adapter(n, 9), found / f"{words.replace(' ', '-')}.safetensors", format="native")
    retriever.save(found / "retriever")
    return found


def test_a_folder_is_searched_by_a_stored_retriever(retriever, folder):
    found = find_adapters(Retriever.load(folder / "retriever"), "a red dress", folder, top=2)
    assert found[0].name == "red-dress" and found[0].path == folder / "red-dress.safetensors" and len(found) == 2
    assert found == find_adapters(retriever, "a red dress", folder, top=2)


def test_the_command(folder):
    done = CliRunner().invoke(app, ["retrieve", "a small dog", "--from", str(folder), "--top", "1", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)[0]["name"] == "small-dog"


def test_rejects_folders_without_a_retriever_or_adapters(retriever, folder, tmp_path):
    with refuses("unknown_format", match="no retriever in"):
        Retriever.load(tmp_path)
    (tmp_path / "retriever.safetensors").write_bytes(b"no tensors")
    with refuses("corrupt_file", match="was not written by a retriever"):
        Retriever.load(tmp_path)
    with refuses("unknown_format", match="no adapters in"):
        find_adapters(retriever, "a red dress", tmp_path)
    with refuses("choice_error", match="top=3 adapters cannot be chosen from 0"):
        retriever.rank("a red dress", {})
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    made = lorac.compile(model, {"d": lorac.SHiRA(r=1)}).adapters["d"]
    with refuses("option_error", match="probes=0"):
        WeightEncoder(SIZES, 32, probes=0)
    with refuses("adapter_error", match="is not a product of two factors"):
        find_sizes([made], model)


@torch.no_grad()
def test_pooled_vectors_are_the_text_encoders_own(retriever, tmp_path):
    pooled = Retriever(retriever.encoder, retriever.text_encoder, retriever.tokenizer)
    given = retriever.tokenizer(["a red dress"], return_tensors="pt")
    wanted = F.normalize(retriever.text_encoder(**given).pooler_output, dim=-1)
    assert_close(pooled.embed_prompts(["a red dress"]), wanted)
    pooled.save(tmp_path / "pooled")
    assert_close(Retriever.load(tmp_path / "pooled").embed_prompts(["a red dress"]), wanted)
