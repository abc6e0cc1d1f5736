"""The algebra buys speed only: whatever rules are taken away, W' and b' stay; and every rule earns its place."""

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorac
from lorac.ir.algebra.reduction import Params, reduce_weight
from lorac.ir.algebra.rules import RULES
from lorac.testing import HOSTS, Case, assert_close
from lorac.testing.parity import ROUNDING
from tests.ir.algebra.formulas import FORMULAS, IN, OUT, Formula

WHOLE = {"delta", "dense"}
"""Forms with a matrix as large as W."""


def used(reduced):
    """Names of the rules that a reduction makes something of: without any other it is the same."""
    names = set()

    def noting(rule):
        def build(analysis, node):
            form = rule.build(analysis, node)
            if form is not None:
                names.add(rule.name)
            return form

        return replace(rule, build=build)

    reduced(tuple(map(noting, RULES)))
    return sorted(names)


def rules_without(name):
    return tuple(rule for rule in RULES if rule.name != name)


def tables(reduced):
    """All rules, none, and all but each that counts."""
    return RULES, (), *map(rules_without, used(reduced))


@functools.cache
def used_by(name):
    return used(FORMULAS[name].reduced)


@pytest.mark.medium("random formulas with and without rules, and each of these without any")
@pytest.mark.parametrize("name", FORMULAS)
def test_results_do_not_depend_on_a_rule(name):
    formula = FORMULAS[name]
    expected = formula.direct()
    for table in (RULES, (), *map(rules_without, used_by(name))):
        found = formula.merged(formula.reduced(table))
        assert_close(found[0], expected[0])
        assert_close(found[1], expected[1])


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
def test_form(formula):
    reduction = formula.reduced()
    assert (reduction.form, reduction.rank) == (formula.form, formula.rank), reduction.reasons


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
def test_every_form_is_dense_without_rules(formula):
    # The base itself needs no rule, nor does a matrix that is added to it.
    assert formula.reduced(()).form in WHOLE


@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_every_rule_is_needed(rule):
    """A rule without which nothing gets dearer is to be deleted."""
    cheap = (formula for name, formula in FORMULAS.items() if formula.form not in WHOLE and rule in used_by(name))
    dearer = any(formula.reduced(rules_without(rule)).form in WHOLE for formula in cheap)
    assert dearer, f"no formula needs the rule '{rule}'"


def test_every_rule_documents_its_identity():
    assert all(rule.build.__doc__ for rule in RULES)
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert len(rules_without("sum")) == len(RULES) - 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wide factor", "inner size 4 of a 6 x 4 product saves nothing"),
        ("blocks as large as the input", "its blocks are not two or more squares of one size"),
        ("blocks of two sizes", "its blocks are not two or more squares of one size"),
        ("one value at many positions", "its positions are not two lists of the length of its values"),
        ("scatter and factor", "mixed structure"),
        ("product of entries", "the formula's result has no recognised structure"),
    ],
)
def test_a_near_miss_gives_a_reason(name, reason):
    assert any(reason in found for found in FORMULAS[name].reduced().reasons)


def test_reads_the_base_only_where_needed():
    reads = {name: FORMULAS[name].reduced().reads_weight for name in ("sum of a factor", "number", "scatter")}
    assert reads == dict.fromkeys(reads, False)
    assert FORMULAS["reads the base"].reduced().reads_weight
    assert FORMULAS["norm of the result"].reduced().reads_weight


def test_reduction_holds_for_every_value_of_the_parameters():
    formula = FORMULAS["rows"]
    reduction = formula.reduced()
    W, b = formula.base()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        p = {n: torch.randn(t.shape, generator=generator).double() for n, t in formula.tensors().items()}
        outputs = reduction(W, b, [p[n] for n in reduction.params])
        low = outputs["a"] @ outputs["b"]
        assert_close(outputs["c"][:, None] * W + low.t(), formula.weight(W, Params(**p)))


def test_reduction_has_gradients():
    formula = FORMULAS["reflection"]
    reduction = formula.reduced()
    W, b = formula.base()
    grads = []
    for evaluate in (lambda u: _merged(reduction, W, b, u), lambda u: formula.weight(W, Params(u=u))):
        u = formula.tensors()["u"].requires_grad_()
        evaluate(u).square().sum().backward()
        grads.append(u.grad)
    assert_close(grads[0], grads[1])


def _merged(reduction, W, b, u):
    outputs = reduction(W, b, [u])
    return W + (outputs["a"] @ outputs["b"]).t()


@pytest.mark.parametrize(
    ("variant", "form"),
    [(lorac.LoRA(r=2), "low-rank"), (lorac.DoRA(r=2), "low-rank"), (lorac.SHiRA(r=2), "sparse")],
    ids=["lora", "dora", "shira"],
)
def test_methods(variant, form):
    """The conformance kit takes all rules away at once; here each in turn."""
    case = Case(variant, HOSTS["linear"])
    tensors = case.a.tensors["site"]

    def formula(W, b, p):
        return variant.weight(W, p), variant.new_bias(b, p)

    expected = variant.weight(case.weight, Params(**tensors))

    def reduced(table):
        return reduce_weight(formula, tuple(case.weight.shape), tensors, torch.float64, table)

    for table in tables(reduced):
        reduction = reduced(table)
        assert table is not RULES or reduction.form == form
        case_formula = _As(case, tensors, variant)
        assert_close(case_formula.merged(reduction)[0], expected)


class _As(Formula):
    """A method's tensors in the place of a formula's own."""

    def __init__(self, case, tensors, variant):
        object.__setattr__(self, "case", case)
        object.__setattr__(self, "given", tensors)

    def tensors(self):
        return self.given

    def base(self):
        return self.case.weight, self.case.bias


# --- random formulas ------------------------------------------------------------------------------------------------


class _Drawn:
    """A random formula: expressions over W and parameters that it makes as it goes."""

    def __init__(self, draw):
        self.draw, self.shapes, self.integers, self.text = draw, {}, {}, []

    def parameter(self, *shape):
        name = f"p{len(self.shapes)}"
        self.shapes[name] = shape
        return lambda W, p: getattr(p, name)

    def index(self, size, high):
        name = f"i{len(self.integers)}"
        values = self.draw(st.lists(st.integers(0, high - 1), min_size=size, max_size=size))
        self.integers[name] = torch.tensor(values)
        return lambda W, p: getattr(p, name)

    def matrix(self, n, m, depth):
        """An expression of shape (n, m)."""
        leaves = [self.zeros, self.factor] + ([self.base] if (n, m) == (OUT, IN) else [])
        leaves += [self.identity, self.blocks] if n == m else []
        inner = [self.sum, self.number, self.rows, self.columns, self.quotient, self.minus, self.copy, self.turned]
        inner += [self.product, self.addmm, self.scatter, self.opaque]
        make = self.draw(st.sampled_from(leaves if depth == 0 else inner + leaves))
        self.text.append(make.__name__)
        return make(n, m, depth - 1)

    def base(self, n, m, depth):
        return lambda W, p: W

    def zeros(self, n, m, depth):
        return lambda W, p: W.new_zeros(n, m)

    def identity(self, n, m, depth):
        return lambda W, p: torch.eye(n, dtype=torch.float64)

    def blocks(self, n, m, depth):
        size = self.draw(st.sampled_from([k for k in range(1, n + 1) if n % k == 0]))
        t = self.parameter(n // size, size, size)
        return lambda W, p: torch.block_diag(*t(W, p))

    def factor(self, n, m, depth):
        rank = self.draw(st.integers(1, 2))
        b, a = self.parameter(n, rank), self.parameter(rank, m)
        return lambda W, p: b(W, p) @ a(W, p)

    def opaque(self, n, m, depth):
        x = self.matrix(n, m, depth)
        return lambda W, p: torch.tanh(x(W, p))

    def sum(self, n, m, depth):
        x, y = self.matrix(n, m, depth), self.matrix(n, m, depth)
        alpha, difference = self.draw(st.sampled_from([1, 0.7, -2])), self.draw(st.booleans())
        add = torch.sub if difference else torch.add
        return lambda W, p: add(x(W, p), y(W, p), alpha=alpha)

    def number(self, n, m, depth):
        x, shape = self.matrix(n, m, depth), self.draw(st.sampled_from([(), (1,), (1, 1)]))
        t = self.parameter(*shape)
        return lambda W, p: t(W, p) * x(W, p) * 0.5

    def rows(self, n, m, depth):
        x, c = self.matrix(n, m, depth), self.parameter(n, 1)
        return lambda W, p: x(W, p) * c(W, p)

    def columns(self, n, m, depth):
        x = self.matrix(n, m, depth)
        d = self.parameter(*self.draw(st.sampled_from([(m,), (1, m)])))
        return lambda W, p: d(W, p) * x(W, p)

    def quotient(self, n, m, depth):
        x = self.matrix(n, m, depth)
        divisor = self.parameter(*self.draw(st.sampled_from([(), (1, 1), (n, 1), (m,), (1, m)])))
        return lambda W, p: x(W, p) / divisor(W, p)

    def minus(self, n, m, depth):
        x = self.matrix(n, m, depth)
        return lambda W, p: -x(W, p)

    def copy(self, n, m, depth):
        x = self.matrix(n, m, depth)
        return lambda W, p: x(W, p).clone()

    def turned(self, n, m, depth):
        x = self.matrix(m, n, depth)
        return lambda W, p: x(W, p).t()

    def product(self, n, m, depth):
        middle = self.draw(st.sampled_from([n, m, 2]))
        x, y = self.matrix(n, middle, depth), self.matrix(middle, m, depth)
        return lambda W, p: x(W, p) @ y(W, p)

    def addmm(self, n, m, depth):
        x, rank = self.matrix(n, m, depth), self.draw(st.integers(1, 2))
        b, a = self.parameter(n, rank), self.parameter(rank, m)
        return lambda W, p: torch.addmm(x(W, p), b(W, p), a(W, p), beta=0.9, alpha=1.3)

    def scatter(self, n, m, depth):
        x, rows, cols = self.matrix(n, m, depth), self.index(3, n), self.index(3, m)
        values = self.parameter(*self.draw(st.sampled_from([(3,), (1,)])))
        return lambda W, p: torch.index_put(x(W, p), (rows(W, p), cols(W, p)), values(W, p), accumulate=True)


@pytest.mark.parametrize("examples", [15, pytest.param(300, marks=pytest.mark.slow)])
def test_random_formulas(examples):
    settings(max_examples=examples, deadline=None, derandomize=True)(given(data=st.data())(_compare))()


def _compare(data):
    drawn = _Drawn(data.draw)
    expression = drawn.matrix(OUT, IN, 4)
    formula = Formula(expression, drawn.shapes, "any", integers=drawn.integers)
    W, _ = formula.base()
    expected, rules = formula.direct()[0], used(formula.reduced)
    tables = [RULES, (), *([rules_without(data.draw(st.sampled_from(rules)))] if rules else [])]
    # Terms may cancel: the error is judged by the size of what was added up.
    size = torch.linalg.vector_norm(expected) + torch.linalg.vector_norm(W) * 10
    for table in tables:
        found = formula.merged(formula.reduced(table))[0]
        assert torch.linalg.vector_norm(found - expected) <= ROUNDING[W.dtype] * size, drawn.text
