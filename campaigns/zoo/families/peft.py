"""Every adapter type of PEFT that lorac reads, with its settings, on the kinds of layers that it adapts.

The hosts are those that PEFT tests its types on: linears, an embedding and GPT-2's transposed linear, convolutions.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from campaigns.zoo.entries import Call, Entry


class Linears(nn.Module):
    """Two linears and a softmax."""

    def __init__(self, inside: int = 20) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, inside), nn.Linear(inside, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log_softmax(self.second(torch.relu(self.first(x))), -1)


class Words(nn.Module):
    """An embedding, GPT-2's transposed linear, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed, self.turned, self.last = nn.Embedding(40, 10), Conv1D(8, 10), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.last(torch.tanh(self.turned(self.embed(x))))
        return answer


class Kernels(nn.Module):
    """A convolution in one, two or three dimensions, and a linear."""

    def __init__(self, dimensions: int, *, inside: int = 10, **settings: Any) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.first: nn.Module = kind(4, inside, 3, **settings)
        self.second = nn.Linear(inside, 6)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.second(torch.relu(self.first(x)).flatten(2).mean(-1))
        return answer


class Normed(nn.Module):
    """Norms between linears."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(10, 20), nn.LayerNorm(20), nn.Linear(20, 6)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.second(self.norm(torch.relu(self.first(x))))
        return answer


class Attending(nn.Module):
    """torch's attention, which packs its projections."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.second = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.second(self.attention(x, x, x, need_weights=False)[0])
        return answer


def _vectors(width: int, model: nn.Module, batch: int, length: int, seed: int) -> Call:
    return {"x": torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))}


def _words(model: nn.Module, batch: int, length: int, seed: int) -> Call:
    return {"x": torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(seed))}


def _field(dimensions: int, model: nn.Module, batch: int, length: int, seed: int) -> Call:
    return {"x": torch.randn(batch, 4, *(6,) * dimensions, generator=torch.Generator().manual_seed(seed))}


HOSTS: Mapping[str, tuple[Any, Any]] = {
    "linears": (Linears, functools.partial(_vectors, 10)),
    "wide": (functools.partial(Linears, 32), functools.partial(_vectors, 10)),
    "words": (Words, _words),
    "conv1d": (functools.partial(Kernels, 1), functools.partial(_field, 1)),
    "conv2d": (functools.partial(Kernels, 2), functools.partial(_field, 2)),
    "conv2d-padded": (functools.partial(Kernels, 2, padding="same"), functools.partial(_field, 2)),
    "conv2d-circular": (
        functools.partial(Kernels, 2, padding=1, padding_mode="circular"),
        functools.partial(_field, 2),
    ),
    "conv2d-grouped": (functools.partial(Kernels, 2, groups=2), functools.partial(_field, 2)),
    "conv3d": (functools.partial(Kernels, 3), functools.partial(_field, 3)),
    "conv3d-unbiased": (functools.partial(Kernels, 3, bias=False), functools.partial(_field, 3)),
    "normed": (Normed, functools.partial(_vectors, 10)),
    "attending": (Attending, functools.partial(_vectors, 8)),
}
CONVS = ("conv1d", "conv2d", "conv3d")
BOTH, FIRST, SECOND = ["first", "second"], ["first"], ["second"]
SAVED = {"target_modules": FIRST, "modules_to_save": SECOND}
WORDS = (
    {"target_modules": ["turned"], "fan_in_fan_out": True},
    {"target_modules": ["embed"]},
    {"target_modules": ["embed", "turned"], "fan_in_fan_out": True},
)
Settings = Mapping[str, Any]


def _on(hosts: str | tuple[str, ...], *settings: Settings) -> list[tuple[str, Settings]]:
    return list(itertools.product(hosts.split() if isinstance(hosts, str) else hosts, settings))


def _usual(**more: Any) -> list[Settings]:
    """Return the first, the second or both, and one trained whole."""
    return [{"target_modules": t, **more} for t in (FIRST, SECOND, BOTH)] + [{**SAVED, **more}]


CASES: Mapping[str, list[tuple[str, Settings]]] = {
    "LORA": [
        *_on("linears", *_usual()),
        *_on("linears", *_usual(use_dora=True), {"target_modules": BOTH, "use_rslora": True, "lora_alpha": 4}),
        *_on("linears", {"target_modules": BOTH, "lora_bias": True}, {"target_modules": BOTH, "bias": "all"}),
        *_on("linears", {"target_modules": BOTH, "rank_pattern": {"first": 2}, "alpha_pattern": {"second": 3}}),
        *_on("words", *WORDS),
        *_on("words", {"target_modules": ["embed"], "use_dora": True}),
        *_on(CONVS, {"target_modules": FIRST}, {"target_modules": BOTH}, {"target_modules": BOTH, "use_dora": True}),
        *_on("conv2d-padded conv2d-circular conv3d-unbiased", {"target_modules": BOTH}),
        *_on("conv2d-grouped", {"target_modules": BOTH, "r": 4}),
        *_on("attending", {"target_modules": ["attention"]}, {"target_modules": ["attention", "second"]}),
        *_on("linears", {"target_modules": SECOND, "target_parameters": ["first.weight"]}),
        *_on("words", {"target_modules": ["last"], "trainable_token_indices": {"embed": [1, 3]}}),
    ],
    "IA3": [
        *_on(
            "linears conv2d",
            *(
                {"target_modules": t, "feedforward_modules": f}
                for t, f in ((FIRST, []), (FIRST, FIRST), (BOTH, []), (BOTH, FIRST), (BOTH, BOTH))
            ),
        ),
        *_on("linears", {**SAVED, "feedforward_modules": FIRST}),
        *_on(
            "words", {"target_modules": ["turned", "last"], "feedforward_modules": ["turned"], "fan_in_fan_out": True}
        ),
        *_on("conv3d", {"target_modules": FIRST, "feedforward_modules": []}),
    ],
    "LOHA": [
        *_on("linears", *_usual(), {"target_modules": BOTH, "alpha": 4, "r": 3}),
        *_on("conv1d conv2d", *({"target_modules": BOTH, "use_effective_conv2d": e} for e in (False, True))),
    ],
    "LOKR": [
        *_on(
            "linears",
            *_usual(),
            *(
                {"target_modules": BOTH, "r": 1, "alpha": 1, "decompose_both": True, "decompose_factor": f}
                for f in (-1, 4)
            ),
        ),
        *_on(
            "conv1d conv2d",
            *(
                {"target_modules": BOTH, "use_effective_conv2d": e, "decompose_both": b, "decompose_factor": f}
                for e, b, f in ((False, False, -1), (True, False, -1), (True, True, -1), (True, True, 4))
            ),
        ),
    ],
    "OFT": [
        *_on(
            "linears",
            *_usual(oft_block_size=0, r=2),
            *(
                {"target_modules": BOTH, "oft_block_size": 0, "r": 2, "coft": c, "eps": 0.6, "block_share": s}
                for c, s in ((True, False), (False, True), (True, True))
            ),
        ),
        *_on("linears", {"target_modules": BOTH, "oft_block_size": 5, "use_cayley_neumann": False}),
        *_on(
            "conv2d",
            *(
                {"target_modules": FIRST, "oft_block_size": 0, "r": 2, "coft": c, "eps": 0.6, "block_share": s}
                for c, s in ((False, False), (True, False), (False, True))
            ),
        ),
    ],
    "BOFT": [
        *_on(
            "linears",
            {"target_modules": SECOND, "boft_block_size": 2},
            {**SAVED, "boft_block_size": 2},
            {"target_modules": SECOND, "boft_block_size": 0, "boft_block_num": 2},
            {"target_modules": SECOND, "boft_block_size": 10, "boft_n_butterfly_factor": 2},
            {"target_modules": SECOND, "boft_block_size": 2, "boft_n_butterfly_factor": 2},
        ),
        *_on(
            "wide",
            {"target_modules": SECOND, "boft_block_size": 2, "boft_n_butterfly_factor": 3},
            {"target_modules": SECOND, "boft_block_size": 0, "boft_block_num": 8, "boft_n_butterfly_factor": 3},
        ),
        *_on(
            "conv2d",
            {"target_modules": FIRST, "boft_block_size": 36},
            {"target_modules": FIRST, "boft_block_size": 0, "boft_block_num": 1},
            {"target_modules": FIRST, "boft_block_size": 2, "boft_n_butterfly_factor": 2},
        ),
    ],
    "HRA": [*_on("linears conv2d", *_usual(r=2)), *_on("linears", {"target_modules": BOTH, "r": 2, "apply_GS": True})],
    "BEFT": [*_on("linears", *_usual())],
    "C3A": [*_on("linears", *_usual(block_size=2, init_weights=True))],
    "DELORA": [*_on("linears", *_usual(r=3))],
    "GLORA": [
        *_on(
            "linears",
            *_usual(r=3),
            *({"target_modules": BOTH, "config_A_B": f} for f in ("vector", "constant", "none")),
        )
    ],
    "GRALORA": [
        *_on("linears", *_usual(r=4), {"target_modules": BOTH, "r": 4, "hybrid_r": 2}),
        *_on("words", {"target_modules": ["turned"], "fan_in_fan_out": True, "r": 4}),
    ],
    "LILY": [*_on("linears", *_usual(r=3))],
    "ROAD": [*_on("linears", *_usual(group_size=2), {"target_modules": BOTH, "group_size": 2, "variant": "road_4"})],
    "VERA": [
        *_on("linears", *_usual(r=3), {"target_modules": BOTH, "save_projection": False}),
        *_on("words", {"target_modules": ["turned"], "fan_in_fan_out": True}),
    ],
    "RANDLORA": [
        *_on(
            "linears",
            *_usual(r=3),
            {"target_modules": BOTH, "r": 3, "sparse": True},
            {"target_modules": BOTH, "r": 3, "very_sparse": True},
        ),
        *_on("words", {"target_modules": ["turned"], "fan_in_fan_out": True, "r": 3}),
    ],
    "FOURIERFT": [
        *_on("linears", *_usual(n_frequency=10, init_weights=True, scaling=30.0)),
        *_on(
            "words",
            {
                "target_modules": ["turned"],
                "fan_in_fan_out": True,
                "n_frequency": 10,
                "init_weights": True,
                "scaling": 30.0,
            },
        ),
    ],
    "DEFT": [*_on("linears", *_usual(r=2)), *_on("linears", {"target_modules": BOTH, "r": 2, "para": True})],
    "WAVEFT": [
        *_on("linears", *_usual(n_frequency=10), {"target_modules": BOTH, "n_frequency": 10, "use_idwt": False})
    ],
    "PEANUT": [*_on("linears", *_usual(r=2), {"target_modules": BOTH, "r": 2, "depth": 1, "act_fn": "gelu"})],
    "FROD": [*_on("linears", *_usual(sparse_rate=0.1), {"target_modules": BOTH, "sparse_rate": 0.5})],
    "PSOFT": [*_on("linears", *_usual(r=2), {"target_modules": BOTH, "r": 2, "psoft_svd": "lowrank"})],
    "TINYLORA": [
        *_on("linears", *_usual(u=5), {"target_modules": BOTH, "u": 5, "weight_tying": 1.0}),
        *_on("words", {"target_modules": ["turned"], "fan_in_fan_out": True, "u": 5}),
    ],
    "UNILORA": [
        *_on("linears", *_usual(theta_d_length=31), {"target_modules": BOTH, "save_indices": True}),
        *_on("words", {"target_modules": ["turned"], "fan_in_fan_out": True}),
    ],
    "VBLORA": [
        *_on("linears", *_usual(r=2, vector_length=2, num_vectors=10)),
        *_on("words", {"target_modules": ["turned"], "fan_in_fan_out": True, "vector_length": 2, "num_vectors": 10}),
    ],
    "ADALORA": [
        *_on("linears", *_usual(total_step=10, init_r=3, target_r=2)),
        *_on("words", {"target_modules": ["turned"], "fan_in_fan_out": True, "total_step": 10}),
        *_on("conv2d", {"target_modules": BOTH, "total_step": 10}),
    ],
    "MISS": [
        *_on(
            "linears",
            *_usual(r=2),
            {"target_modules": FIRST, "r": 2, "init_weights": "bat"},
            {"target_modules": FIRST, "r": 2, "mini_r": 2, "init_weights": "mini"},
        )
    ],
    "HIRA": [
        *_on("linears", *_usual(r=2)),
        *_on(
            "words",
            {"target_modules": ["embed"], "r": 2},
            {"target_modules": ["turned"], "fan_in_fan_out": True, "r": 2},
        ),
        *_on(CONVS, {"target_modules": BOTH, "r": 2}),
    ],
    "SHIRA": [*_on("linears", *_usual(r=1, random_seed=3))],
    "TRAINABLE_TOKENS": [*_on("words", {"target_modules": ["embed"], "token_indices": list(range(0, 40, 3))})],
    "LN_TUNING": [
        *_on("normed", {"target_modules": ["norm"]}, {"target_modules": ["norm"], "modules_to_save": SECOND}),
        *_on("linears", {"target_modules": FIRST}),
    ],
}
"""PEFT type: (host, settings) of each case."""


def entries() -> list[Entry]:
    """One entry a case, counted under PEFT."""
    return list(_entries())


def _entries() -> Iterator[Entry]:
    for kind, cases in CASES.items():
        for number, (host, settings) in enumerate(cases, 1):
            build, inputs = HOSTS[host]
            config = functools.partial(_config, kind, settings)
            yield Entry(
                f"peft/{kind.lower()}-{number:02}-{host}",
                "PEFT",
                build,
                inputs,
                config,
                functools.partial(_shapes, host),
                False,
            )


def _config(kind: str, settings: Settings, model: nn.Module) -> Any:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](**settings)


def _shapes(host: str, call: Call) -> dict[str, Any]:
    free = (0,) if host.startswith("conv") else (0, 1)
    return {"x": dict.fromkeys(free, torch.export.Dim.AUTO)}
