"""Configurations and tensors of every PEFT type: the adapters they become, and rejected ones."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorac
from lorac import (
    BAT,
    BEFT,
    BOFT,
    C3A,
    DEFT,
    HRA,
    IA3,
    OFT,
    OSF,
    PSOFT,
    AdaLoRA,
    AdaMSS,
    AdapterError,
    DeLoRA,
    FormatError,
    FourierFT,
    FRoD,
    GLoRAHadamard,
    GraLoRA,
    HiRA,
    Lily,
    LNTuning,
    LoHa,
    LoKr,
    LoracError,
    MiSS,
    PEANuT,
    Poly,
    PVeRA,
    RandLoRA,
    RoAd,
    SiteError,
    SuperTuning,
    TinyLoRA,
    UniLoRA,
    VBLoRA,
    VeRA,
    WaveFT,
    load_adapter,
    save_adapter,
)
from lorac.variants.base import Variant
from tests.parity import assert_parity
from tests.peft_files import CONFIG, WEIGHTS, change_tensors, configure, load_peft, of_peft_0_21, save_small
from tests.refusing import refuses
from tests.zoo import ZOO

Copy = Callable[[str], Path]
MODEL = ZOO["plain_mlp"].model


def _id(value: Any) -> str | None:
    return "-".join(value) if isinstance(value, dict) else type(value).__name__ if isinstance(value, Variant) else None


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("originals")


@pytest.fixture
def copy_of(originals: Path, tmp_path: Path) -> Copy:
    """Return a function that copies a small checkpoint of a type, to be damaged."""

    def copy_of(kind: str) -> Path:
        if not (originals / kind).exists():
            save_small(originals / kind, kind)
        return Path(shutil.copytree(originals / kind, tmp_path / kind))

    return copy_of


# The configuration

BECOMES: tuple[tuple[str, dict[str, Any], Variant], ...] = (
    (
        "ADAMSS",
        {"use_dynamic_rank": True, "svd_threshold": 0.5, "random_seed": 3, "use_asa": True, "init_warmup": 7},
        AdaMSS(r=4, num_subspaces=3, subspace_rank=2, use_dynamic_rank=True, svd_threshold=0.5, random_seed=3),
    ),
    ("ADALORA", {"bias": "lora_only", "lora_dropout": 0.25}, AdaLoRA(r=3, alpha=5, bias="adalora_only", dropout=0.25)),
    ("BEFT", {"modules_to_save": ["head"]}, BEFT(modules_to_save=("head",))),
    ("BOFT", {"bias": "boft_only", "boft_dropout": 0.5}, BOFT(block_size=2, bias="boft_only")),
    pytest.param(
        "DEFT",
        {"bias": "deft_only", "alpha": 4, "decomposition_method": "relu"},
        DEFT(r=2, alpha=4, decomposition_method="relu", bias="deft_only"),
        marks=of_peft_0_21,
    ),
    ("DEFT", {"para": True, "decomposition_method": "relu"}, DEFT(r=2, para=True)),
    ("C3A", {"bias": "c3a_only", "layers_to_transform": None}, C3A(block_size=2, bias="c3a_only")),
    (
        "DELORA",
        {"bias": "delora_only", "module_dropout": 0.25, "delora_lambda": 4, "lambda_pattern": {"up": 3}},
        DeLoRA(r=2, bias="delora_only", dropout=0.25, delora_lambda=4, lambda_pattern={"up": 3}),
    ),
    ("FOURIERFT", {}, FourierFT(n_frequency=9, scaling=30)),
    (
        "GLORA",
        {"config_A_B": "vector", "config_D_E": "none", "bias": "glora_only"},
        GLoRAHadamard(r=2, config_A_B="vector", config_D_E="none", bias="glora_hadamard_only"),
    ),
    (
        "GRALORA",
        {"hybrid_r": 3, "gralora_k": 1, "gralora_dropout": 0.25, "bias": "gralora_only"},
        GraLoRA(r=2, alpha=3, hybrid_r=3, k=1, dropout=0.25, bias="gralora_only"),
    ),
    ("HIRA", {"hira_dropout": 0.25, "rank_pattern": {"up": 1}}, HiRA(r=2, dropout=0.25)),
    ("HRA", {"bias": "hra_only", "exclude_modules": ["head"]}, HRA(r=2, exclude=("head",), bias="hra_only")),
    ("IA3", {"exclude_modules": ["head"]}, IA3(exclude=("head",), feedforward=("down",))),
    ("LILY", {"num_B": 3, "stride_A": 2, "scaling": 0.5}, Lily(r=2, num_B=3, stride_A=2, scaling=0.5)),
    ("LN_TUNING", {}, LNTuning()),
    ("LOHA", {"rank_dropout": 0.25, "module_dropout": 0.5}, LoHa(r=2, alpha=3)),
    ("LOKR", {"rank_dropout_scale": True}, LoKr(r=2, alpha=3, decompose_both=True, decompose_factor=2)),
    ("MISS", {"miss_dropout": 0.25}, MiSS(r=2, dropout=0.25)),
    ("MISS", {"bias": "MiSS_only"}, MiSS(r=2, bias="miss_only")),
    ("MISS", {"init_weights": "mini", "mini_r": 2}, MiSS(r=2, mini=True, mini_r=2)),
    ("MISS", {"init_weights": "bat", "miss_dropout": 0.25, "bias": "MiSS_only"}, BAT(r=2, bias="bat_only")),
    (
        "OFT",
        {"bias": "oft_only", "module_dropout": 0.5, "block_share": True, "num_cayley_neumann_terms": 4},
        OFT(block_size=2, bias="oft_only", block_share=True, num_cayley_neumann_terms=4),
    ),
    ("OSF", {"rank_pattern": {"up": 0.5}}, OSF(effective_rank=2, rank_pattern={".*(?:up).*": 0.5})),
    ("PVERA", {"pvera_dropout": 0.25, "generator_seed": 3}, PVeRA(r=2, dropout=0.25)),
    (
        "PEANUT",
        {"act_fn": "gelu", "scaling": 0.5, "exclude_modules": ["head"]},
        PEANuT(r=2, depth=1, act_fn="gelu", scaling=0.5, exclude=("head",)),
    ),
    (
        "FROD",
        {"frod_dropout": 0.25, "projection_prng_key": 4, "bias": "frod_only"},
        FRoD(sparse_rate=0.1, dropout=0.25, projection_prng_key=4, bias="frod_only"),
    ),
    (
        "PSOFT",
        {"psoft_dropout": 0.25, "ab_svd_init": "pissa_init", "psoft_mag_a": False, "psoft_orth": False},
        PSOFT(r=2, alpha=3, dropout=0.25, ab_svd_init="pissa_init", psoft_mag_a=False, psoft_orth=False),
    ),
    (
        "PSOFT",
        {"psoft_svd": "lowrank", "random_seed": 4, "use_cayley_neumann": True, "cayley_neumann_eps": 0.5},
        PSOFT(r=2, alpha=3, psoft_svd="lowrank", random_seed=4, use_cayley_neumann=True, cayley_neumann_eps=0.5),
    ),
    (
        "RANDLORA",
        {"projection_prng_key": 3, "randlora_dropout": 0.25, "bias": "randlora_only", "sparse": True},
        RandLoRA(r=2, alpha=4, projection_prng_key=3, dropout=0.25, bias="randlora_only", sparse=True),
    ),
    ("ROAD", {"variant": "road_4"}, RoAd(variant="road_4", group_size=2)),
    ("SUPERTUNING", {"select_top": False}, SuperTuning(sparsity=0.9, select_top=False)),
    (
        "TINYLORA",
        {"weight_tying": 1.0, "projection_seed": 3, "tinylora_dropout": 0.25, "bias": "tinylora_only"},
        TinyLoRA(
            r=2, u=5, weight_tying=1.0, projection_seed=3, dropout=0.25, bias="tinylora_only", order=("up", "down")
        ),
    ),
    (
        "UNILORA",
        {"proj_seed": 3, "unilora_dropout": 0.25, "init_theta_d_bound": 0.1},
        UniLoRA(
            r=2,
            theta_d_length=11,
            proj_seed=3,
            dropout=0.25,
            init_theta_d_bound=0.1,
            starts={"up": 0, "down": 48, "": 88},
        ),
    ),
    pytest.param(
        "VBLORA",
        {"topk": 3, "vblora_dropout": 0.25, "init_vector_bank_bound": 0.03, "bias": "vblora_only"},
        VBLoRA(
            r=2,
            num_vectors=6,
            vector_length=2,
            topk=3,
            dropout=0.25,
            init_vector_bank_bound=0.03,
            bias="vblora_only",
        ),
        marks=of_peft_0_21,
    ),
    (
        "VERA",
        {"projection_prng_key": 3, "vera_dropout": 0.25, "d_initial": 0.5, "bias": "vera_only"},
        VeRA(r=2, projection_prng_key=3, dropout=0.25, d_initial=0.5, bias="vera_only"),
    ),
    (
        "WAVEFT",
        {"wavelet_family": "sym4", "scaling": 3, "random_loc_seed": 5, "bias": "waveft_only"},
        WaveFT(n_frequency=9, wavelet_family="sym4", scaling=3, random_loc_seed=5, bias="waveft_only"),
    ),
    ("WAVEFT", {"use_idwt": False}, WaveFT(n_frequency=9, use_idwt=False)),
)
"""PEFT type, settings, and the variant that they are, but for its targets."""


@pytest.mark.parametrize(("kind", "settings", "expected"), BECOMES, ids=_id)
def test_reads_the_fields(kind: str, settings: dict[str, Any], expected: Variant, tmp_path: Path) -> None:
    folder = save_small(tmp_path / "f", kind, **settings)
    variant = load_adapter(folder, MODEL()).variant
    assert sorted(variant.targets) == ["down", "up"]
    assert variant == dataclasses.replace(expected, targets=variant.targets)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("LOHA", {"rank_dropout": 0.25, "module_dropout": 0.5}), ("LOKR", {"rank_dropout_scale": True})],
    ids=_id,
)
def test_fields_of_training_are_kept(kind: str, settings: dict[str, Any], copy_of: Copy, tmp_path: Path) -> None:
    folder = copy_of(kind)
    configure(folder, **settings)
    save_adapter(load_adapter(folder), tmp_path / "g")
    assert json.loads((tmp_path / "g" / CONFIG).read_text()).items() >= settings.items()


WRONG: dict[str, list[tuple[str, object]]] = {
    "ADAMSS": [
        ("r", 0),
        ("num_subspaces", "3"),
        ("subspace_rank", None),
        ("use_dynamic_rank", 1),
        ("random_seed", None),
    ],
    "ADALORA": [
        ("init_r", 0),
        ("lora_alpha", 0),
        ("use_dora", True),
        ("loftq_config", {"loftq_bits": 4}),
        ("rank_pattern", {"up.lora_E": 2}),
        ("rank_pattern", {"up": [True]}),
        ("rank_pattern", [True]),
        ("layer_replication", [[0, 1]]),
    ],
    "BEFT": [("modules_to_save", 3)],
    "BOFT": [("boft_block_size", -1), ("boft_block_num", "2"), ("boft_n_butterfly_factor", 0), ("bias", "some")],
    "DEFT": [("r", 0), ("alpha", "4"), ("decomposition_method", "svd"), ("para", 1), ("deft_dropout", "0.1")],
    "C3A": [("block_size", 0), ("block_size_pattern", {"up": 0}), ("bias", "some")],
    "DELORA": [("r", 0), ("delora_lambda", "15"), ("lambda_pattern", {"up": None}), ("module_dropout", None)],
    "FOURIERFT": [("n_frequency", 0), ("scaling", "30"), ("random_loc_seed", None), ("bias", "lora_only")],
    "GLORA": [("r", 0), ("config_A_B", "matrix"), ("config_C", "constant"), ("config_D_E", "lora")],
    "GRALORA": [("r", 0), ("hybrid_r", -1), ("gralora_k", 0), ("alpha", None), ("bias", "some")],
    "HIRA": [("r", 0), ("hira_dropout", "0.1")],
    "HRA": [("r", 0), ("apply_GS", "yes"), ("bias", "some"), ("layers_to_transform", ["0"])],
    "IA3": [("feedforward_modules", 3), ("exclude_modules", [1])],
    "LILY": [("r", 0), ("stride_A", 0), ("num_B", "2"), ("scaling", None)],
    "LN_TUNING": [("target_modules", None), ("target_modules", 3), ("exclude_modules", [1])],
    "LOHA": [("r", 0), ("alpha", None), ("use_effective_conv2d", "yes")],
    "LOKR": [("r", 0), ("alpha", None), ("decompose_factor", 0), ("decompose_both", 1)],
    "MISS": [("r", 0), ("mini_r", None), ("init_weights", "bone"), ("miss_dropout", "0.1"), ("bias", "some")],
    "OFT": [
        ("r", -1),
        ("oft_block_size", "2"),
        ("block_share", "yes"),
        ("use_cayley_neumann", 1),
        ("num_cayley_neumann_terms", 0),
        ("coft", "yes"),
        ("eps", None),
        ("bias", "some"),
    ],
    "OSF": [("effective_rank", "2"), ("rank_pattern", {"up": None})],
    "PVERA": [("r", 0), ("sample_at_inference", True), ("bias", "vera_only"), ("pvera_dropout", "0.1")],
    "PEANUT": [("r", 0), ("depth", -1), ("act_fn", "softmax"), ("scaling", None)],
    "FROD": [("sparse_rate", None), ("save_projection", 1), ("bias", "lora_only")],
    "PSOFT": [
        ("r", 0),
        ("psoft_alpha", None),
        ("ab_svd_init", "pissa"),
        ("psoft_svd", "random"),
        ("psoft_orth", 1),
        ("cayley_neumann_eps", "0.9"),
    ],
    "RANDLORA": [("r", 0), ("randlora_alpha", None), ("sparse", 1), ("projection_prng_key", 0.5)],
    "ROAD": [("variant", "road_3"), ("group_size", 0)],
    "SUPERTUNING": [("sparsity", None), ("select_top", 1), ("r", 0), ("lora_alpha", "2")],
    "TINYLORA": [("r", 0), ("u", "5"), ("weight_tying", None), ("projection_seed", 0.5), ("init_weights", "zeros")],
    "UNILORA": [("r", 0), ("theta_d_length", None), ("proj_seed", -1), ("save_indices", 1), ("bias", "some")],
    "VBLORA": [("r", 0), ("topk", "2"), ("vector_length", None), ("save_only_topk_weights", 1)],
    "VERA": [
        ("r", 0),
        ("projection_prng_key", "0"),
        ("save_projection", "yes"),
        ("bias", "lora_only"),
        ("d_initial", None),
    ],
    "WAVEFT": [("n_frequency", 0), ("scaling", None), ("wavelet_family", "coif1"), ("use_idwt", 1), ("bias", "some")],
}
"""Fields and values that no file of a type may have."""


@pytest.mark.parametrize(("kind", "name", "value"), [(kind, *row) for kind, rows in WRONG.items() for row in rows])
def test_wrong_fields(kind: str, name: str, value: object, copy_of: Copy) -> None:
    folder = copy_of(kind)
    configure(folder, **{name: value})
    with refuses("unsupported_field", match=f"sets {name}="):
        load_adapter(folder, MODEL())


# The tensors


@dataclasses.dataclass(frozen=True)
class Damaged:
    """A checkpoint whose configuration and tensors disagree.

    Attributes:
        kind: its PEFT type.
        match: what the error says.
        fields: changes of its configuration.
        tensors: changes of its tensors.
        error: what is raised.
        alone: without the model, too.
    """

    kind: str
    match: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    tensors: dict[str, Tensor | None] = dataclasses.field(default_factory=dict)
    error: type[LoracError] = AdapterError
    alone: bool = True

    @property
    def id(self) -> str:
        return "-".join((self.kind, *self.fields, *self.tensors))


DAMAGED = (
    Damaged("ADAMSS", r"adamss_A at '.*' has shape \(3, 2, 4\), expected \(3, 1", {"subspace_rank": 1}, alone=False),
    Damaged("ADAMSS", "gives other groups of rows than the file", {"num_subspaces": 4}, error=FormatError, alone=False),
    Damaged("ADAMSS", "gives other groups of rows than the file", {"r": 3}, error=FormatError, alone=False),
    Damaged("ADAMSS", "'.*up' do not belong together", tensors={"model.up.adamss_A.1": None}, alone=False),
    Damaged("ADAMSS", "'up' do not belong together", tensors={"model.up.adamss_newB": None}, alone=False),
    Damaged(
        "BOFT",
        "'down': 2 factors need",
        {"boft_n_butterfly_factor": 2},
        {f"model.{path}.boft_R": torch.zeros(2, n, 2, 2) for path, n in (("up", 5), ("down", 7))},
        error=SiteError,
    ),
    Damaged("BOFT", r"'down'|'up'", {"boft_block_size": 14}),
    Damaged("DEFT", r"deft_P at 'down' has shape \(6, 2\), expected \(6, 3\)", {"r": 3}),
    Damaged("DEFT", "do not belong together: deft_P .*, deft_R", {"para": True}),
    Damaged("WAVEFT", r"waveft_spectrum at '.*' has shape \(9,\), expected \(8,\)", {"n_frequency": 8}, alone=False),
    Damaged("C3A", r"c3a_kernel at 'down' has shape \(3, 7, 2\), expected \(6, 14, 1\)", {"block_size": 1}),
    Damaged("DELORA", r"delora_A at '.*' has shape \(2, .*\), expected \(3", {"r": 3}),
    Damaged(
        "FOURIERFT", r"fourierft_spectrum at '.*' has shape \(9,\), expected \(8,\)", {"n_frequency": 8}, alone=False
    ),
    Damaged("GLORA", "do not belong together", {"config_A_B": "vector"}),
    Damaged(
        "GLORA",
        "'up' do not belong together",
        tensors={"model.up.glora_C.zeros": torch.ones(10, 1)},
    ),
    Damaged("GLORA", "D scales the base's bias", {"bias": "all"}, error=FormatError),
    Damaged("GRALORA", "'up' do not belong together", tensors={"model.up.gralora_A": None}),
    Damaged("GRALORA", "do not belong together", {"hybrid_r": 2}),
    Damaged(
        "HIRA",
        r"'up' do not belong together: hira_A \(2, 10\), hira_B \(14, 3\)",
        tensors={"model.up.hira_B": torch.zeros(14, 3)},
    ),
    Damaged("HRA", r"shape \(14, 2\), expected \(14, 3\)", {"r": 3}),
    Damaged("LILY", r"lily_B at '.*' has shape \(4, .*\), expected \(6", {"num_B": 3}),
    Damaged("LN_TUNING", "LN_TUNING accounts for 2 tensors", {"exclude_modules": ["up"]}, error=FormatError),
    Damaged(
        "LN_TUNING",
        r"lacks tensors.*'up\.weight', 'up\.bias'",
        tensors={"model.up.ln_tuning_layers.weight": None, "model.up.ln_tuning_layers.bias": None},
        error=FormatError,
        alone=False,
    ),
    Damaged("LOHA", "'up' do not belong together", tensors={"model.up.hada_w2_b": None}),
    Damaged("LOKR", "'up' do not belong together", tensors={"model.up.lokr_w2": torch.zeros(7, 5)}),
    Damaged("LOKR", r"lokr_w1 at 'down' has shape \(2, 2\), expected \(3, 2\)", {"decompose_factor": 3}),
    Damaged("LOKR", "'down' do not belong together.*\n.*no layer is so divided", {"decompose_factor": 1}),
    Damaged("MISS", r"'down' do not belong together: miss_block \(2, 6\)", {"init_weights": "bat"}),
    Damaged("MISS", r"shape \(2, 6\), expected \(3, 6\)", {"r": 3}),
    Damaged(
        "MISS",
        r"shape \(2, 5\), expected \(2, 6\)",
        tensors={"model.down.miss_block": torch.zeros(2, 5)},
        alone=False,
    ),
    Damaged("OFT", "oft_R at 'down'", {"oft_block_size": 7}, alone=False),
    Damaged("PEANUT", r"shape \(2, 6\), expected \(3, 6\)", {"r": 3}),
    Damaged("PEANUT", r"peanut_encoders at 'down' has shape \(1, 2, 2\), expected \(2, 2, 2\)", {"depth": 2}),
    Damaged("PEANUT", "do not belong together: .*\n.*depth=0", {"depth": 0}),
    Damaged(
        "PEANUT",
        "layers are numbered from 0",
        tensors={"model.up.peanut_encoders.0.weight": None, "model.up.peanut_encoders.2.weight": torch.zeros(2, 2)},
    ),
    Damaged("FROD", "do not belong together: .*frod_V", tensors={"model.up.frod_lambda_s_values": None}, alone=False),
    Damaged("FROD", "lacks 'frod_V'", tensors={"frod_V.up": None, "frod_V.down": None}, error=FormatError, alone=False),
    Damaged(
        "FROD",
        "frod_s_size at 'up' is not",
        tensors={"frod_s_size.up": torch.tensor([3, 3])},
        error=FormatError,
        alone=False,
    ),
    Damaged("PSOFT", r"psoft_R at 'down' has shape \(1,\), expected \(3,\)", {"r": 3}, alone=False),
    Damaged("PSOFT", "do not belong together: .*vector_a", {"psoft_mag_a": False}, alone=False),
    Damaged("BEFT", r"'up' do not belong together", tensors={"model.up.beft_bias": torch.zeros(14)}),
    Damaged("RANDLORA", r"randlora_A at 'down' has shape \(2, 1, 14\), expected \(3, 1, 6\)", {"r": 3}, alone=False),
    Damaged("ROAD", r"road_alpha at 'up' has shape \(6,\)", tensors={"model.up.road_alpha": torch.ones(6)}),
    Damaged(
        "TINYLORA",
        r"tinylora_A at 'up' has shape \(2, 9\), expected \(2, 10\)",
        tensors={"model.up.tinylora_A": torch.zeros(2, 9)},
        alone=False,
    ),
    Damaged("TINYLORA", "'down' do not belong together.*\n.*u is 6", {"u": 6}, alone=False),
    Damaged("TINYLORA", "'down' do not belong together", tensors={"tinylora_v.1": None}, alone=False),
    Damaged(
        "TINYLORA",
        "no site of adapter 'TINYLORA' uses 'tinylora_v.2'",
        tensors={"tinylora_v.2": torch.zeros(5)},
        error=FormatError,
        alone=False,
    ),
    Damaged("UNILORA", "'up' do not belong together", {"theta_d_length": 12}, alone=False),
    Damaged(
        "UNILORA",
        "'up' do not belong together",
        tensors={"model.up.unilora_indices_A": torch.zeros(2, 10, dtype=torch.int64)},
        alone=False,
    ),
    Damaged("VBLORA", "'up' do not belong together", tensors={"model.up.vblora_logits_B": None}),
    Damaged("VBLORA", "lacks 'vblora_vector_bank'", tensors={"vblora_vector_bank": None}, error=FormatError),
    Damaged("VERA", "lacks 'vera_B', which all its sites share", tensors={"vera_B": None}, error=FormatError),
    Damaged(
        "VERA",
        r"vera_A at 'down' has shape \(2, 5\), expected \(2, 14\)",
        tensors={"vera_A": torch.zeros(2, 5)},
        alone=False,
    ),
)


@pytest.mark.parametrize("kind", WRONG)
def test_rejects_a_tensor_without_a_path(kind: str, copy_of: Copy) -> None:
    folder = copy_of(kind)
    save_file({**load_file(folder / WEIGHTS), "weight": torch.ones(2)}, folder / WEIGHTS)
    with pytest.raises(FormatError, match="accounts for 1 tensors: 'weight'"):
        load_adapter(folder, MODEL())


@pytest.mark.parametrize("damaged", DAMAGED, ids=lambda damaged: damaged.id)
def test_a_file_that_disagrees_with_itself(damaged: Damaged, copy_of: Copy) -> None:
    folder = copy_of(damaged.kind)
    configure(folder, **damaged.fields)
    change_tensors(folder, damaged.tensors)
    for model in (MODEL(), None) if damaged.alone else (MODEL(),):
        with pytest.raises(damaged.error, match=damaged.match) as error:
            load_adapter(folder, model)
        assert type(error.value) is damaged.error


@torch.no_grad()
def test_boft_has_as_many_factors_as_its_file(tmp_path: Path) -> None:
    """Without its CUDA extension PEFT trains one, whatever is configured, and saves the configuration as it was."""
    folder, model, inputs = (
        save_small(tmp_path / "two", "BOFT", boft_n_butterfly_factor=2),
        MODEL(),
        ZOO["plain_mlp"].inputs(),
    )
    assert json.loads((folder / CONFIG).read_text())["boft_n_butterfly_factor"] == 2
    for read in (load_adapter(folder, model), load_adapter(folder)):
        assert isinstance(read.variant, BOFT)
        assert read.variant.n_butterfly_factor == 1
        answer = lorac.compile(model, {"a": read})(**inputs)
        assert_parity(answer, load_peft(model, folder)(**inputs), model(**inputs))


@pytest.mark.parametrize("kind", WRONG)
def test_no_tensors_at_all(kind: str, copy_of: Copy) -> None:
    folder = copy_of(kind)
    save_file({}, folder / WEIGHTS)
    with refuses("corrupt_file", match=r"no tensor of its method|which all its sites share"):
        load_adapter(folder)


# The sites

ATTENTION = "transformer.h.0.attn.c_attn"
NOT_ADAPTED: tuple[tuple[str, Variant, str, str], ...] = (
    ("ADAMSS", AdaMSS(r=3, targets=(ATTENTION,)), "tiny_gpt2", "GPT-2's Conv1D"),
    ("ADALORA", AdaLoRA(r=2, targets=("grouped",)), "plain_conv", "of kind conv2d with 2 groups"),
    ("BEFT", BEFT(targets=(ATTENTION,)), "tiny_gpt2", "GPT-2's Conv1D"),
    ("BOFT", BOFT(block_size=4, targets=(ATTENTION,)), "tiny_gpt2", "GPT-2's Conv1D"),
    ("DEFT", DEFT(r=2, targets=("embed",)), "plain_mlp", "of kind embedding"),
    ("WAVEFT", WaveFT(n_frequency=3, targets=("embed",)), "plain_mlp", "of kind embedding"),
    ("C3A", C3A(block_size=8, targets=(ATTENTION,)), "tiny_gpt2", "GPT-2's Conv1D"),
    ("DELORA", DeLoRA(targets=(ATTENTION,)), "tiny_gpt2", "GPT-2's Conv1D"),
    ("GLORA", GLoRAHadamard(targets=(ATTENTION,)), "tiny_gpt2", "GPT-2's Conv1D"),
    ("FOURIERFT", FourierFT(n_frequency=3, targets=("embed",)), "plain_mlp", "of kind embedding"),
    ("HIRA", HiRA(r=2, targets=("grouped",)), "plain_conv", "of kind conv2d with 2 groups"),
    ("HRA", HRA(r=2, targets=(ATTENTION,)), "tiny_gpt2", "GPT-2's Conv1D"),
    ("IA3", IA3(targets=("line",)), "plain_conv", "of kind conv1d"),
    ("LILY", Lily(targets=(ATTENTION,)), "tiny_gpt2", "GPT-2's Conv1D"),
    ("LOHA", LoHa(r=1, targets=(ATTENTION,)), "tiny_gpt2", "GPT-2's Conv1D"),
    ("LOHA", LoHa(r=1, targets=("embed",)), "plain_mlp", "of kind embedding"),
    ("LOKR", LoKr(r=8, targets=(ATTENTION,)), "tiny_gpt2", "GPT-2's Conv1D"),
    ("MISS", MiSS(r=2, targets=(ATTENTION,)), "tiny_gpt2", "GPT-2's Conv1D"),
    ("OFT", OFT(block_size=3, targets=("line",)), "plain_conv", "of kind conv1d"),
    ("PEANUT", PEANuT(r=2, targets=(ATTENTION,)), "tiny_gpt2", "GPT-2's Conv1D"),
    ("FROD", FRoD(targets=("embed",)), "plain_mlp", "of kind embedding"),
    ("PSOFT", PSOFT(r=2, targets=("embed",)), "plain_mlp", "of kind embedding"),
    ("POLY", Poly(targets=(ATTENTION,)), "tiny_gpt2", "GPT-2's Conv1D"),
    ("RANDLORA", RandLoRA(r=2, targets=("embed",)), "plain_mlp", "of kind embedding"),
    ("ROAD", RoAd(group_size=2, targets=(ATTENTION,)), "tiny_gpt2", "GPT-2's Conv1D"),
    ("TINYLORA", TinyLoRA(r=2, targets=("stem",)), "plain_conv", "of kind conv2d"),
    ("UNILORA", UniLoRA(r=2, targets=("embed",)), "plain_mlp", "of kind embedding"),
    ("VBLORA", VBLoRA(r=2, num_vectors=5, vector_length=2, targets=("stem",)), "plain_conv", "of kind conv2d"),
    ("VERA", VeRA(r=2, targets=("embed",)), "plain_mlp", "of kind embedding"),
)
"""PEFT type, a variant on one site that lorac adapts and PEFT does not, its model in the zoo, and what the site is."""


@pytest.mark.parametrize(("kind", "variant", "model", "what"), NOT_ADAPTED, ids=_id)
def test_rejects_saving_sites_that_peft_does_not_adapt(
    kind: str, variant: Variant, model: str, what: str, tmp_path: Path
) -> None:
    host = ZOO[model].model()
    adapter = lorac.compile(host, {"a": variant}).adapters["a"]
    with refuses("site_unsupported", match=f"{kind} does not adapt '{variant.targets[0]}', which is {what}"):
        save_adapter(adapter, tmp_path / "x", model=host)
