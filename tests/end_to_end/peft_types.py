"""Cases of every PEFT type but LORA and SHIRA, whose tables are `peft_cases`.

Of a type's transformers the first is in the fast suite, the others are in the long run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    AdamssConfig,
    BeftConfig,
    BOFTConfig,
    C3AConfig,
    DeftConfig,
    DeloraConfig,
    FourierFTConfig,
    FrodConfig,
    GloraConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LilyConfig,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    OFTConfig,
    OSFConfig,
    PeanutConfig,
    PeftConfig,
    PsoftConfig,
    PveraConfig,
    RandLoraConfig,
    RoadConfig,
    SupertuningConfig,
    TinyLoraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
)

from tests.end_to_end.peft_cases import Case, build, tie


def _of(config: type[PeftConfig], **defaults: Any) -> Callable[..., Case]:
    """A builder of cases of one type; what it is given next to names are settings of PEFT or attributes of `Case`."""

    def case(name: str, model: str, *targets: str, **settings: Any) -> Case:
        return build(config, name, model, **{"target_modules": list(targets), **defaults, **settings})

    return case


adamss = _of(AdamssConfig, r=2, num_subspaces=3, subspace_rank=2, alone=False)
adalora = _of(AdaLoraConfig, init_r=3, target_r=2, lora_alpha=5, total_step=10)
beft = _of(BeftConfig)
boft = _of(BOFTConfig)
deft = _of(DeftConfig, r=3, dtype=torch.float32)  # PEFT computes in no other
# PEFT transforms in float32 only. From zeros, as FOURIERFT.
c3a = _of(C3AConfig, block_size=2, init_weights=True, dtype=torch.float32)
delora = _of(DeloraConfig, r=3)
# PEFT transforms in float32 only. From zeros: what it draws at first moves the output far more than decides anything.
fourierft = _of(FourierFTConfig, n_frequency=30, scaling=20.0, init_weights=True, dtype=torch.float32, alone=False)
glora = _of(GloraConfig, r=3)
gralora = _of(GraloraConfig, r=4, alpha=6)
hira = _of(HiraConfig, r=3)
hra = _of(HRAConfig, r=4)
ia3 = _of(IA3Config)
lily = _of(LilyConfig, r=3)
ln_tuning = _of(LNTuningConfig)
# PEFT rounds alpha/r to float32: quotients that are exact there leave float64 to decide.
loha = _of(LoHaConfig, r=3, alpha=6)
lokr = _of(LoKrConfig, r=2, alpha=5)
miss = _of(MissConfig, r=3)
oft = _of(OFTConfig)
osf = _of(OSFConfig, alone=False)
pvera = _of(PveraConfig, r=3)
peanut = _of(PeanutConfig, r=3)
psoft = _of(PsoftConfig, r=3, psoft_alpha=6, dtype=torch.float32, alone=False)  # factors are made in no other
randlora = _of(RandLoraConfig, r=3, randlora_alpha=6)
road = _of(RoadConfig, group_size=2)
supertuning = _of(SupertuningConfig, sparsity=0.8, alone=False)
tokens = _of(TrainableTokensConfig, alone=False)
tinylora = _of(TinyLoraConfig, u=9, alone=False)
unilora = _of(UniLoraConfig, theta_d_length=31, alone=False)
frod = _of(FrodConfig, sparse_rate=0.1, progressbar=False, dtype=torch.float32, alone=False)  # U is made in no other
vblora = _of(VBLoRAConfig, r=3, num_vectors=7, vector_length=2)
vera = _of(VeraConfig, r=3)
waveft = _of(WaveFTConfig, n_frequency=30, scaling=5.0, alone=False)

OUTER = {"layers_to_transform": [0, 2]}
NO_POOLER = {"exclude_modules": ["pooler.dense"]}
HEAD, CLASSIFIER = {"modules_to_save": ["head"]}, {"modules_to_save": ["classifier"]}
KERNELS = ("stem", "grouped", "dilated", "head")
CONVS = (*KERNELS, "line")
BY_NUMBER, BY_RANK = {"boft_block_size": 0}, {"oft_block_size": 0}
EXACT = {"use_cayley_neumann": False}
TAPS = {"use_effective_conv2d": True, "back": False, "late": True}
SEED = {"save_projection": False, "projection_prng_key": 7, "alone": False}  # A and B are drawn for the model
# In float32, the one dtype in which PEFT reads such a file. lorac writes whole ones: see formats/test_peft_banks.py.
CHOSEN = {"save_only_topk_weights": True, "dtype": torch.float32, "back": False}

CASES: tuple[Case, ...] = (
    adalora("bias", "plain_mlp", "up", "head", bias="lora_only", init_r=1),
    adalora("saved", "plain_mlp", "up", bias="all", **HEAD),
    adalora("conv", "plain_conv", "stem", "dilated", "head", emitted=True),
    adalora("linear", "tiny_llama", "q_proj", "down_proj", **OUTER),
    adalora("linear", "tiny_bert", "query", "value", "dense", **NO_POOLER),
    adalora("conv1d", "tiny_gpt2", "c_attn", "c_proj", fan_in_fan_out=True),
    adamss("plain", "plain_mlp", "up", "down", "head", emitted=True),
    adamss("ranks", "plain_mlp", "up", "down", use_dynamic_rank=True, svd_threshold=0.5, subspace_rank=4, **HEAD),
    adamss("layers", "tiny_llama", "q_proj", "down_proj", r=20, **OUTER),
    adamss("saved", "tiny_bert", "query", "dense", random_seed=3, **CLASSIFIER),
    beft("biases", "plain_mlp", "up", "head", emitted=True),
    beft("no_biases", "tiny_llama", "v_proj", "down_proj"),
    beft("biases", "tiny_bert", "value", **CLASSIFIER),
    boft("size", "plain_mlp", "up", "down", "head", boft_block_size=2, bias="all", emitted=True),
    boft("number", "plain_conv", "stem", "head", boft_block_num=1, bias="boft_only", **BY_NUMBER),
    boft("number", "tiny_bert", "query", "dense", boft_block_num=4, **BY_NUMBER, **CLASSIFIER),
    boft("size", "tiny_llama", "q_proj", "down_proj", boft_block_size=8, **OUTER),
    deft("relu", "plain_mlp", "up", "down", "head", bias="deft_only", emitted=True),
    deft("qr", "plain_mlp", "up", "down", decomposition_method="qr", alpha=4, **HEAD),
    deft("para", "plain_mlp", "up", "head", para=True, r=20, bias="all"),
    deft("layers", "tiny_llama", "q_proj", "down_proj", **OUTER),
    deft("saved", "tiny_bert", "query", "dense", **NO_POOLER, **CLASSIFIER),
    deft("conv1d", "tiny_gpt2", "c_attn", "c_proj", fan_in_fan_out=True),
    c3a("pattern", "plain_mlp", "up", "down", bias="c3a_only", block_size_pattern={"up": 1}, emitted=True),
    c3a("saved", "plain_mlp", "up", bias="all", **HEAD),
    c3a("layers", "tiny_llama", "q_proj", "down_proj", block_size=16, **OUTER),
    c3a("saved", "tiny_bert", "query", "dense", block_size=4, **CLASSIFIER),
    delora("bias", "plain_mlp", "up", "head", bias="delora_only", delora_lambda=2, emitted=True),
    delora("patterns", "plain_mlp", "up", rank_pattern={"up": 2}, lambda_pattern={"up": 3}, bias="all", **HEAD),
    delora("layers", "tiny_llama", "q_proj", "down_proj", **OUTER),
    delora("saved", "tiny_bert", "query", "dense", **NO_POOLER, **CLASSIFIER),
    fourierft("bias", "plain_mlp", "up", "head", bias="fourier_only", n_frequency_pattern={"up": 140}, emitted=True),
    fourierft("saved", "plain_mlp", "up", bias="all", random_loc_seed=3, **HEAD),
    fourierft("linear", "tiny_llama", "q_proj", "down_proj", **OUTER),
    fourierft("linear", "tiny_bert", "query", "value", "dense", **NO_POOLER),
    fourierft("conv1d", "tiny_gpt2", "c_attn", "c_proj", fan_in_fan_out=True),
    glora("lora", "plain_mlp", "up", "down", "head", emitted=True),
    glora("vector", "plain_mlp", "up", "down", config_A_B="vector", config_C="vector", config_D_E="vector", **HEAD),
    glora("constant", "plain_mlp", "up", "down", config_A_B="constant", config_C="none", config_D_E="none", bias="all"),
    glora("none", "plain_mlp", "up", config_A_B="none", config_D_E="none"),
    glora("no_biases", "tiny_llama", "q_proj", "down_proj"),
    glora("biases", "tiny_bert", "query", "dense", config_D_E="vector", **CLASSIFIER),
    gralora("blocks", "plain_mlp", "up", "down", bias="gralora_only", emitted=True),
    gralora("hybrid", "plain_mlp", "up", "down", hybrid_r=3, bias="all", **HEAD),
    gralora("layers", "tiny_llama", "q_proj", "down_proj", r=8, gralora_k=4, **OUTER),
    gralora("hybrid", "tiny_bert", "query", "dense", hybrid_r=2, **CLASSIFIER),
    gralora("conv1d", "tiny_gpt2", "c_attn", "c_proj", fan_in_fan_out=True),
    hira("embedding", "plain_mlp", "embed", "up", "head", r=5, emitted=True),
    hira("saved", "plain_mlp", "up", **HEAD),
    hira("conv", "plain_conv", "stem", "dilated", "line", "head"),
    hira("linear", "tiny_bert", "query", "value", "dense", **NO_POOLER),
    hira("linear", "tiny_llama", "q_proj", "down_proj", **OUTER),
    hira("embedding", "tiny_llama", "embed_tokens", "v_proj"),
    hira("conv1d", "tiny_gpt2", "c_attn", "c_proj", fan_in_fan_out=True),
    hra("bias", "plain_mlp", "up", "down", "head", r=2, bias="all", emitted=True),
    hra("bias", "plain_conv", "stem", "head", r=2, bias="hra_only"),
    hra("layers", "tiny_llama", "q_proj", "down_proj", **OUTER),
    hra("saved", "tiny_bert", "query", "dense", r=6, **NO_POOLER, **CLASSIFIER),
    ia3("both", "plain_mlp", "up", "down", "head", feedforward_modules=["down", "head"], emitted=True),
    ia3("both", "plain_conv", *KERNELS, feedforward_modules=["stem", "grouped", "head"], emitted=True),
    ia3("outputs", "tiny_bert", "key", "value", "dense", feedforward_modules=[], task_type="SEQ_CLS", **CLASSIFIER),
    ia3("both", "tiny_llama", "k_proj", "v_proj", "down_proj", feedforward_modules=["down_proj"]),
    ia3("both", "tiny_gpt2", "c_attn", "mlp.c_proj", feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
    ia3("both", "tiny_t5", "k", "v", "wo", feedforward_modules=["wo"]),
    lily("plain", "plain_mlp", "up", "down", "head", scaling=0.7, emitted=True, modes=("live",)),
    lily("shared", "tiny_llama", "q_proj", "down_proj", stride_A=2, modes=("live",)),
    lily("saved", "tiny_bert", "query", "dense", num_B=3, modes=("live",), **CLASSIFIER),
    ln_tuning("linears", "plain_mlp", "up", "head"),
    ln_tuning("buffers", "resnet18", "bn1"),
    ln_tuning("norms", "tiny_bert", "LayerNorm", emitted=True, **CLASSIFIER),
    ln_tuning("norms", "tiny_llama", "input_layernorm", "post_attention_layernorm", "norm"),
    ln_tuning("pattern", "tiny_gpt2", target_modules=r".*ln_[12f]", exclude_modules=["h.0.ln_1"]),
    loha("patterns", "plain_mlp", "up", "head", rank_pattern={"up": 1}, alpha_pattern={"head": 9}),
    loha("conv", "plain_conv", *CONVS, rank_pattern={"line": 2}),
    loha("effective", "plain_conv", *CONVS, use_effective_conv2d=True, rank_pattern={"line": 2}, emitted=True),
    loha("single_taps", "resnet18", "conv2", "downsample.0", "fc", **TAPS),
    loha("linear", "tiny_llama", "q_proj", "down_proj", **OUTER),
    loha("linear", "tiny_bert", "query", "value", "dense", **NO_POOLER),
    lokr(
        "patterns", "plain_mlp", "up", "down", "head", rank_pattern={"up": 9}, alpha_pattern={"head": 2}, emitted=True
    ),
    lokr("whole", "plain_conv", *KERNELS, r=8),
    lokr("factored", "plain_conv", *CONVS, r=1),
    lokr("effective", "plain_conv", *CONVS, use_effective_conv2d=True, decompose_both=True),
    lokr("single_taps", "resnet18", "conv2", "downsample.0", "fc", **TAPS),
    lokr("factor", "tiny_bert", "query", "value", "dense", decompose_factor=4, **NO_POOLER),
    lokr("lycoris", "tiny_bert", "query", "dense", init_weights="lycoris", r=1, decompose_both=True),
    lokr("both", "tiny_llama", "q_proj", "down_proj", decompose_both=True, **OUTER),
    # One adapter at a time: of two BATs active together PEFT applies the second to the weight that the first left.
    miss("miss", "plain_mlp", "up", "down", "head", bias="all", emitted=True),
    miss("mini", "plain_mlp", "up", "down", init_weights="mini", mini_r=2, emitted=True, **HEAD),
    miss("bat", "plain_mlp", "up", "down", r=2, init_weights="bat", bias="MiSS_only", emitted=True),
    miss("miss", "tiny_llama", "q_proj", "down_proj", r=5, **OUTER),
    miss("mini", "tiny_llama", "k_proj", "up_proj", init_weights="mini", mini_r=4),
    miss("bat", "tiny_llama", "q_proj", "down_proj", r=4, init_weights="bat"),
    miss("miss", "tiny_bert", "query", "dense", **NO_POOLER),
    miss("bat", "tiny_bert", "query", "dense", r=8, init_weights="bat", **CLASSIFIER),
    oft("series", "plain_mlp", "embed", "up", "down", "head", oft_block_size=4, bias="oft_only", emitted=True),
    oft("exact", "plain_mlp", "up", "down", "head", r=3, **BY_RANK, **EXACT),
    oft("shared", "plain_mlp", "embed", "down", "head", r=2, block_share=True, **BY_RANK),
    oft("constrained", "plain_mlp", "up", "down", oft_block_size=5, coft=True, eps=0.6, **HEAD),
    oft("exact", "tiny_bert", "query", "dense", r=7, **BY_RANK, **EXACT, **CLASSIFIER),
    oft("terms", "tiny_llama", "q_proj", "down_proj", num_cayley_neumann_terms=3, **OUTER),
    oft("default", "tiny_llama", "embed_tokens", "q_proj"),
    osf("half", "plain_mlp", "up", "down", "head", emitted=True),
    osf("patterns", "plain_mlp", "up", "head", effective_rank=3, rank_pattern={"^u": 0.25, "hea": 5}),
    osf("layers", "tiny_llama", "q_proj", "down_proj", effective_rank=0.9),
    pvera("plain", "plain_mlp", "up", "down", "head", bias="all", emitted=True),
    pvera("seed", "plain_mlp", "up", **SEED),
    pvera("layers", "tiny_llama", "q_proj", "down_proj", **OUTER),
    pvera("conv1d", "tiny_gpt2", "c_attn", "c_proj", fan_in_fan_out=True),
    peanut("plain", "plain_mlp", "up", "down", "head", emitted=True),
    peanut("deep", "plain_mlp", "up", "down", depth=2, act_fn="gelu", scaling=2.0, **HEAD),
    peanut("layers", "tiny_llama", "q_proj", "down_proj", depth=1, act_fn="silu", **OUTER),
    peanut("saved", "tiny_bert", "query", "dense", act_fn="tanh", **NO_POOLER, **CLASSIFIER),
    psoft("plain", "plain_mlp", "up", "down", "head", emitted=True),
    psoft("matrix", "plain_mlp", "up", "down", psoft_orth=False, psoft_mag_b=False, ab_svd_init="pissa_init", **HEAD),
    psoft("lowrank", "plain_mlp", "up", psoft_svd="lowrank", random_seed=3, use_cayley_neumann=True),
    psoft("layers", "tiny_llama", "q_proj", "down_proj", use_cayley_neumann=True, cayley_neumann_eps=0.5, **OUTER),
    psoft("saved", "tiny_bert", "query", "dense", r=6, **NO_POOLER, **CLASSIFIER),
    randlora("plain", "plain_mlp", "up", "down", "head", bias="randlora_only", emitted=True),
    randlora("sparse", "plain_mlp", "up", "down", sparse=True, projection_prng_key=4, **HEAD),
    randlora("seed", "plain_mlp", "up", **SEED),
    randlora("layers", "tiny_llama", "q_proj", "down_proj", r=8, **OUTER),
    randlora("bias", "tiny_bert", "query", "value", "dense", bias="all", very_sparse=True, **CLASSIFIER),
    randlora("seed", "tiny_bert", "dense", **SEED),
    randlora("conv1d", "tiny_gpt2", "c_attn", "c_proj", fan_in_fan_out=True, r=5),
    road("one", "plain_mlp", "up", "down", emitted=True),
    road("two", "plain_mlp", "up", "down", variant="road_2", **HEAD),
    road("four", "plain_mlp", "up", "down", variant="road_4"),
    road("groups", "tiny_llama", "q_proj", "down_proj", group_size=8),
    road("four", "tiny_bert", "query", "dense", group_size=4, variant="road_4", **CLASSIFIER),
    supertuning("super", "plain_mlp", "up", "head", emitted=True),
    supertuning("supra", "plain_mlp", "up", "down", r=2, lora_alpha=5, emitted=True, **HEAD),
    supertuning("smallest", "tiny_llama", "q_proj", "down_proj", select_top=False),
    supertuning("computed", "tiny_llama", "q_proj", "v_proj", r=3, save_precomputed_indices=False),
    tokens("rows", "plain_mlp", "embed", token_indices=list(range(0, 23, 2)), emitted=True),
    tokens("chosen-tied", "tiny_llama", target_modules=None, token_indices=list(range(0, 128, 3)), change=tie),
    tinylora("plain", "plain_mlp", "embed", "up", "down", "head", bias="tinylora_only", emitted=True),
    tinylora("groups", "plain_mlp", "embed", "up", "down", "head", weight_tying=0.5, r=20, **HEAD),
    tinylora("seed", "plain_mlp", "up", "down", save_projection=False, projection_seed=7, dtype=torch.float32),
    tinylora("layers", "tiny_llama", "q_proj", "down_proj", weight_tying=1.0, **OUTER),
    tinylora("saved", "tiny_bert", "query", "dense", bias="all", **CLASSIFIER),
    tinylora("conv1d", "tiny_gpt2", "c_attn", "c_proj", fan_in_fan_out=True),
    unilora("plain", "plain_mlp", "up", "down", "head", bias="unilora_only", emitted=True),
    unilora("indices", "plain_mlp", "up", "down", save_indices=True, proj_seed=3, r=2, **HEAD),
    unilora("layers", "tiny_llama", "q_proj", "down_proj", theta_d_length=5000, **OUTER),
    unilora("saved", "tiny_bert", "query", "dense", bias="all", **CLASSIFIER),
    unilora("conv1d", "tiny_gpt2", "c_attn", "c_proj", fan_in_fan_out=True),
    frod("plain", "plain_mlp", "up", "down", bias="frod_only", emitted=True),
    frod("diagonal", "plain_mlp", "up", "down", sparse_rate=0.0, **HEAD),
    frod("key", "tiny_bert", "query", "value", projection_prng_key=3, **CLASSIFIER),
    frod("conv1d", "tiny_gpt2", "c_attn", "c_proj", fan_in_fan_out=True),
    frod("layers", "tiny_llama", "q_proj", "down_proj", **OUTER),
    vblora("plain", "plain_mlp", "up", "down", bias="vblora_only", emitted=True),
    vblora("top3", "plain_mlp", "up", "down", topk=3, **HEAD),
    vblora("chosen", "plain_mlp", "up", "down", **CHOSEN),
    vblora("one", "plain_mlp", "up", "down", topk=1, **CHOSEN),
    vblora("bias", "tiny_bert", "query", "value", bias="all", **CLASSIFIER),
    vblora("chosen", "tiny_bert", "query", "value", topk=3, num_vectors=300, **CHOSEN),
    vblora("layers", "tiny_llama", "q_proj", "down_proj", vector_length=16, r=2, **OUTER),
    vblora("conv1d", "tiny_gpt2", "c_attn", "c_proj", fan_in_fan_out=True, exclude_modules=["h.0.mlp.c_proj"]),
    vera("plain", "plain_mlp", "up", "down", "head", bias="vera_only", emitted=True),
    vera("saved", "plain_mlp", "up", "down", projection_prng_key=4, **HEAD),
    vera("seed", "plain_mlp", "up", **SEED),
    vera("layers", "tiny_llama", "q_proj", "down_proj", **OUTER),
    vera("dense", "tiny_llama", "q_proj", "k_proj", r=64),
    vera("bias", "tiny_bert", "query", "value", "dense", bias="all", **CLASSIFIER),
    vera("seed", "tiny_bert", "dense", **SEED),
    vera("conv1d", "tiny_gpt2", "c_attn", "c_proj", fan_in_fan_out=True),
    waveft("haar", "plain_mlp", "up", "head", bias="waveft_only", n_frequency_pattern={"up": 60}, emitted=True),
    waveft("shares", "plain_mlp", "up", "down", wavelet_family="db4", proportional_parameters=True, **HEAD),
    waveft("entries", "plain_mlp", "up", use_idwt=False, bias="all", random_loc_seed=3),
    waveft("layers", "tiny_llama", "q_proj", "down_proj", wavelet_family="sym5", **OUTER),
    waveft("saved", "tiny_bert", "query", "dense", wavelet_family="sym10", **NO_POOLER, **CLASSIFIER),
    waveft("conv1d", "tiny_gpt2", "c_attn", "c_proj", fan_in_fan_out=True),
)
