"""The checks in eager float64. Each asserts one property of a ``Case``."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lorac.adapters.preparation import Preparer
from lorac.argument_types import Fields
from lorac.errors import AdapterError, CompileError, LoracError, SiteError
from lorac.formats import load_adapter, save_adapter
from lorac.frontend.base_weights import make_base_reader, read_bias
from lorac.ir.algebra.changes import merge_bias, merge_weight
from lorac.ir.algebra.rules import RULES
from lorac.ir.slots.choice import ChoiceSpec
from lorac.merging.merged_model import merge_into
from lorac.session.api import compile
from lorac.testing.case import Case
from lorac.testing.parity import assert_close, assert_parity
from lorac.testing.samples import typical_size
from lorac.variants.adapter import Adapter
from lorac.variants.base import WeightVariant
from lorac.variants.params import Role

MIX = {"a": 0.7, "b": 0.3}


def check_formula(case: Case) -> None:
    """Check that live equals the oracle, for 0 to 2 batch dimensions, with and without gradients."""
    for batch in case.host.batches:
        x = case.inputs(batch)
        for reference in case.references(x).values():
            assert_parity(_call(case.live, x), reference, case.base(x))
            assert_parity(case.live(x), reference, case.base(x))


def check_modes(case: Case) -> None:
    """Check that fused, baked and a merged model equal live; a method without a weight form refuses them."""
    needs_weight = isinstance(case.variant, WeightVariant) or (case.oracle is not None and case.oracle.weight)
    assert case.mergeable or not needs_weight, "a method with a weight form stayed a branch"
    makers: list[tuple[bool, Callable[[], nn.Module]]] = [
        *((case.mergeable, functools.partial(case.compiled, case.a, mode=mode)) for mode in ("fused", "baked")),
        (case.fits_weights, lambda: merge_into(case.model, case.a)),
    ]
    for is_possible, make in makers:
        if not is_possible:
            assert_raises(CompileError, make)
            continue
        made = make()
        for batch in case.host.batches:
            x = case.inputs(batch)
            assert_parity(_call(made, x), _call(case.live, x), case.base(x))


def check_strength(case: Case) -> None:
    """Check that a site's output at strength t is y + t·(y' − y), and a mixture's the sum, live and fused."""
    base, (_, y) = case.base(case.x), case.observe(case.model, case.x)
    moved = {one.name: case.observe(case.compiled(one), case.x)[1] - y for one in (case.a, case.b)}

    def expect(choice: Mapping[str, float]) -> Tensor:
        return case.complete(case.x, y + sum(t * moved[name] for name, t in choice.items()))

    for mode in ("live", "fused") if case.mergeable else ("live",):
        compiled = case.compiled(case.a, case.b, mode=mode)
        for choice in ({"a": 0.5}, MIX):
            assert_parity(_call(compiled, case.x, choice), expect(choice), base)
            assert_parity(compiled(case.x, adapters=choice), expect(choice), base)
    if case.fits_weights:
        merged = merge_into(case.model, [case.a, case.b], MIX)
        assert_parity(_call(merged, case.x), expect(MIX), base)


def check_identity_at_init(case: Case) -> None:
    """Check that a fresh adapter changes nothing if the method promises that, and otherwise changes something."""
    base = case.base(case.x)
    fresh = _call(compile(case.model, {"a": case.variant}), case.x)
    if case.variant.at(case.site).starts_as_base(case.site):
        assert_close(fresh, base)
    else:
        assert not torch.equal(fresh, base), "a fresh adapter changes nothing, though the method says that it does"


def check_training(case: Case) -> None:
    """Check that steps with weight decay change every trainable tensor and nothing else.

    A tensor without a gradient from the output must get one from an extra output, as a router that learns from draws.
    """
    host = {name: t.clone() for name, t in case.model.state_dict().items()}
    compiled = case.compiled(case.a, aux=getattr(case.variant.at(case.site), "emits", ()))
    compiled.train()
    adapter = compiled.adapters["a"]
    named = {f"{path}.{key}": t for path, at in adapter.tensors.items() for key, t in at.items()}
    specs = case.variant.at(case.site).specs(case.site)
    trainable = {key for key in named if specs[key.rpartition(".")[2]].role is Role.TRAINABLE}
    parameters = [p for p in compiled.parameters() if p.requires_grad]
    assert {id(p) for p in parameters} == {id(named[key]) for key in trainable}, "other tensors train than in the specs"
    before = {key: t.detach().clone() for key, t in named.items()}
    base = {name: t.clone() for name, t in compiled.host.state_dict().items()}
    optimiser = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    target = torch.zeros_like(_call(compiled, case.x))
    for _ in range(2):
        optimiser.zero_grad()
        torch.nn.functional.mse_loss(compiled(case.x), target).backward()
        missing = [named[key] for key in trainable if named[key].grad is None]
        emitted = [value for by_site in compiled.aux.values() for value in by_site.values() if value.requires_grad]
        if missing and emitted:
            gradients = torch.autograd.grad([value.sum() for value in emitted], missing, allow_unused=True)
            for parameter, found in zip(missing, gradients, strict=True):
                parameter.grad = found
        for key in trainable:
            gradient = named[key].grad
            # Weight decay alone would change it too.
            assert gradient is not None and bool(gradient.any()), f"{key} gets no gradient"
        optimiser.step()
    for key, tensor in named.items():
        same = torch.equal(before[key], tensor)
        assert same != (key in trainable), f"{key} {'did not train' if same else 'is frozen and changed'}"
    for name, tensor in case.model.state_dict().items():
        assert torch.equal(tensor, host[name]), f"training changed the host's {name}"
    for name, tensor in compiled.host.state_dict().items():
        assert torch.equal(tensor, base[name]), f"training changed the base's {name}"


def check_undo(case: Case) -> None:
    """Check that without an adapter every mode gives the host's output bit for bit, with the base's weights."""
    base = case.base(case.x)
    for mode in ("live", "fused") if case.mergeable else ("live",):
        compiled = case.compiled(case.a, mode=mode)
        assert not torch.equal(_call(compiled, case.x), base), "the adapter does nothing"
        compiled.swap(None)
        assert torch.equal(_call(compiled, case.x), base), f"{mode}: without an adapter the output is not the base's"
        for name, tensor in case.model.state_dict().items():
            assert torch.equal(compiled.host.state_dict()[name], tensor), f"{mode}: {name} is not the base's"


def check_swapping(case: Case) -> None:
    """Check that after any swaps the output equals that of a fresh compile with the same choice, bit for bit."""
    adapters = {"a": case.a, "b": case.b}

    def fresh(mode: str, choice: ChoiceSpec) -> Tensor:
        named = [adapters[n] for n in ([choice] if isinstance(choice, str) else choice or ())]
        return _call(case.compiled(*named, mode=mode, active=choice), case.x)

    for mode in ("live", "fused") if case.mergeable else ("live",):
        compiled = case.compiled(*adapters.values(), mode=mode)
        expected = {str(choice): fresh(mode, choice) for choice in ("a", "b", MIX, None)}
        for choice in ("a", "b", MIX, "a", None, MIX, "b"):
            compiled.swap(choice)
            assert torch.equal(_call(compiled, case.x), expected[str(choice)]), f"{mode}: {choice} after other choices"


def check_saving(case: Case) -> None:
    """Check that a saved and loaded adapter is the same, and gives the same file when saved again."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "first.safetensors"), Path(folder, "second.safetensors")
        save_adapter(case.a, first, format="native", model=case.model)
        loaded = load_adapter(first, case.model)
        save_adapter(loaded, second, format="native", model=case.model)
        assert first.read_bytes() == second.read_bytes(), "saved again, the file differs"
    assert loaded.variant == case.a.variant, f"saved {case.a.variant}, loaded {loaded.variant}"
    for key, tensor in case.a.tensors[case.host.path].items():
        assert torch.equal(loaded.tensors[case.host.path][key], tensor), f"{key} differs after loading"
    assert torch.equal(_call(case.compiled(loaded), case.x), _call(case.live, case.x))


def check_influence(case: Case) -> None:
    """Check that every tensor influences the output.

    A tensor that is only compared, such as a router's bias, needs more noise until an order changes.
    """
    y = _call(case.live, case.x)
    moved = torch.linalg.vector_norm(y - case.base(case.x))

    def moves(key: str, changed: Tensor) -> bool:
        tensors = {**case.a.tensors[case.host.path], key: changed}
        other = Adapter("a", case.a.variant, {case.host.path: tensors})
        return bool(torch.linalg.vector_norm(_call(case.compiled(other), case.x) - y) > 1e-3 * moved)

    specs = case.variant.at(case.site).specs(case.site)
    for key, tensor in case.a.tensors[case.host.path].items():
        if specs[key].of_gradients:
            continue
        changes = [tensor.flip(-1)]
        if tensor.is_floating_point():
            generator = torch.Generator().manual_seed(3)
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
            changes = [tensor + size * typical_size(tensor) * noise for size in (0.5, 5.0)]
        assert any(moves(key, changed) for changed in changes), f"{key} has no influence on the output"


def check_count(case: Case) -> None:
    """Check that the adapter has exactly the tensors of its specs, and as many values as the oracle counts."""
    specs = case.variant.at(case.site).specs(case.site)
    tensors = case.a.tensors[case.host.path]
    assert list(tensors) == list(specs)
    for name, spec in specs.items():
        assert spec.admits(tuple(tensors[name].shape)), f"{name} is {tuple(tensors[name].shape)}, not {spec.shape}"
        assert spec.role is not Role.INDEX or tensors[name].dtype == torch.int64, f"{name} is not an index tensor"
    if case.oracle is not None and case.oracle.count is not None:
        trained = sum(tensors[name].numel() for name, spec in specs.items() if spec.role is Role.TRAINABLE)
        expected = case.oracle.count(case.site.out_features, case.site.in_features, case.variant)
        assert trained == expected, f"{trained} trained values, the oracle counts {expected}"


def check_invalid_values(case: Case) -> None:
    """Check that NaN, and tensors of another kind than the method takes, are refused by a typed error."""
    path = case.host.path
    specs = case.variant.at(case.site).specs(case.site)
    for name, tensor in case.a.tensors[path].items():
        if specs[name].role is Role.INDEX:
            others = (tensor.double(), tensor - 1 - tensor.max(), torch.zeros_like(tensor))
        else:
            others = (tensor.long(), tensor.to(torch.complex64), tensor * torch.nan)
        for other in others:
            adapter = Adapter("a", case.a.variant, {path: {**case.a.tensors[path], name: other}})
            assert_raises(AdapterError, lambda adapter=adapter: case.compiled(adapter))  # type: ignore[misc]  # the default binds the loop's value
    for field in dataclasses.fields(case.variant):
        if isinstance(getattr(case.variant, field.name), float):
            nan: Fields = {field.name: torch.nan}
            make = functools.partial(dataclasses.replace, case.variant, **nan)
            assert_raises(LoracError, lambda make=make: compile(case.model, {"a": make()}))  # type: ignore[misc]  # likewise


def check_rules(case: Case) -> None:
    """Check that the result is the same without the rules of the algebra."""
    if not case.mergeable:
        return
    base = make_base_reader(case.model)
    sites = {case.host.path: case.site}
    with torch.no_grad():
        values = [Preparer(sites, base, table).prepare(case.a).changes[case.host.path] for table in (RULES, ())]
    given, plain = ((merge_weight(v, case.weight), merge_bias(v, read_bias(case.site, case.model))) for v in values)
    assert_close(given[0], plain[0])
    assert (given[1] is None) == (plain[1] is None)
    if given[1] is not None and plain[1] is not None:
        assert_close(given[1], plain[1])


def check_host_unchanged(case: Case) -> None:
    """Check that compiling changes nothing of the host, nor the process's random state."""
    model = case.host.model()
    model.train()
    next(model.parameters()).requires_grad_(False)
    before, state = _describe_model(model), torch.get_rng_state()
    compile(model, {"a": case.variant})
    assert _describe_model(model) == before, "compile changed the host"
    assert torch.equal(torch.get_rng_state(), state), "compile drew from the process's random state"
    for name, tensor in case.host.model().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), f"compile changed the host's {name}"


def check_refused(case: Case) -> None:
    """Check that compile raises a typed error for an unsupported site, or a value that does not exist."""
    assert_raises((SiteError, AdapterError), lambda: compile(case.model, {"a": case.variant}))


CHECKS: Mapping[str, Callable[[Case], None]] = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_formula,
        check_modes,
        check_strength,
        check_identity_at_init,
        check_training,
        check_undo,
        check_swapping,
        check_saving,
        check_influence,
        check_count,
        check_invalid_values,
        check_rules,
        check_host_unchanged,
    )
}
"""The checks at a site of a kind that the variant supports."""


def assert_raises(error: type[Exception] | tuple[type[Exception], ...], call: Callable[[], object]) -> None:
    """Assert that ``call`` raises ``error``, or one of several, and nothing else."""
    try:
        call()
    except error:
        return
    names = [kind.__name__ for kind in (error if isinstance(error, tuple) else (error,))]
    raise AssertionError(f"{' or '.join(names)} was not raised")


def _call(compiled: Callable[..., Tensor], x: Tensor, *choice: ChoiceSpec) -> Tensor:
    chosen = {"adapters": choice[0]} if choice else {}
    with torch.no_grad():
        return compiled(x, **chosen)


def _describe_model(model: nn.Module) -> object:
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: (m.training, len(m._forward_hooks), sorted(vars(m))) for name, m in model.named_modules()}
    return flags, modes
