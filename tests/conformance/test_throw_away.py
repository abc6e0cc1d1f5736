"""A new method is two files, the variant and its oracle, and no edit anywhere: shown with one that is thrown away.

It runs in a process of its own, since a variant once imported stays listed.
"""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow("test_own_methods.py serves methods of a file of their own")

ROOT = Path(__file__).parents[2]

VARIANT = '''
"""Scaled: a low-rank update of a weight whose rows are scaled."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from lorac.variants.params import ParamSpec
from lorac.variants import initialisers
from lorac.variants.base import WeightVariant


@dataclass(frozen=True, kw_only=True)
class Scaled(WeightVariant):
    """``W' = g∘W + s·B·A``, g (out,)."""

    r: int = 4
    scale: float = 1.0

    name: ClassVar[str] = "scaled"
    paper: ClassVar[str] = "none"

    def params(self, site):
        return {
            "A": ParamSpec((self.r, site.in_features), initialisers.kaiming_uniform),
            "B": ParamSpec((site.out_features, self.r), initialisers.zeros),
            "g": ParamSpec((site.out_features,), lambda context: torch.ones(context.shape)),
        }

    def weight(self, W, p):
        return p.g[:, None] * W + self.scale * (p.B @ p.A)
'''

ORACLE = """
import numpy as np


def weight(W, p, variant):
    return np.diag(p.g) @ W + variant.scale * p.B @ p.A


def count(out, columns, variant):
    return variant.r * (out + columns) + out
"""

SCRIPT = """
import sys
import lorac.variants
lorac.variants.__path__.append(sys.argv[1])  # as if the file lay in the package's folder
import lorac
from lorac.testing import HOSTS, conformance
sys.path.append(sys.argv[2])
import scaled as oracle

assert "scaled" in lorac.variants()
assert lorac.Scaled is lorac.variants()["scaled"]
checks = conformance(lorac.Scaled, oracle, hosts={name: HOSTS[name] for name in ("linear", "block")})
checks += conformance(lorac.Scaled, oracle, hosts={"conv": HOSTS["conv"]}, targets=())
for check in checks:
    check()
    print(check)
"""


def test_a_seventh_variant_is_two_files(tmp_path):
    package, oracles = tmp_path / "variants", tmp_path / "oracles"
    for folder, text in ((package, VARIANT), (oracles, ORACLE)):
        folder.mkdir()
        (folder / "scaled.py").write_text(text)

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(package), str(oracles)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    passed = done.stdout.split()
    for name in ("formula", "modes", "swapping", "saving", "training", "rules"):
        assert f"scaled,r=3,scale=0.7-linear-{name}" in passed
        assert f"scaled,r=1,scale=0.7-conv-{name}" in passed
    assert "scaled,r=3,scale=0.7-linear-onnxruntime-live" in passed
    assert "scaled,r=3,scale=0.7-linear-onnxruntime-merged" in passed
    assert "scaled,r=3,scale=0.7-block-refused" in passed
