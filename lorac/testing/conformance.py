"""The list of checks that every variant must pass, for any test runner."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from lorac.testing import eager_checks as checks
from lorac.testing import target_checks as emitted
from lorac.testing import two_layer_checks as several
from lorac.testing.case import Case, Oracle
from lorac.testing.hosts import HOSTS, ConformanceHost
from lorac.testing.samples import describe_sample, samples
from lorac.variants.base import Variant


@dataclass(frozen=True)
class Check:
    """One named check; calling it raises ``AssertionError`` where the variant fails.

    Attributes:
        name: method, configuration, host and property.
        run: runs the check.
    """

    name: str
    run: Callable[[], None] = field(repr=False)

    def __call__(self) -> None:
        self.run()

    def __str__(self) -> str:
        return self.name


def conformance(
    variant: type[Variant] | Variant,
    oracle: Oracle | ModuleType | None = None,
    *,
    targets: Iterable[str] = ("onnxruntime",),
    hosts: Mapping[str, ConformanceHost] = HOSTS,
    **fields: Any,
) -> list[Check]:
    """Return every check of a variant, on every host.

        @pytest.mark.parametrize("check", lorac.testing.conformance(MyVariant, my_oracle), ids=str)
        def test_my_variant(check):
            check()

    On each host that the variant's ``check`` accepts: formula = oracle, live = fused = baked, strength and mixture,
    identity at init, training changes trainable tensors only, undo and swap bit for bit, save and load, influence of
    every tensor, parameter count, invalid values refused, algebra rules dispensable, and the targets equal to eager. On
    other hosts: a typed error.

    Args:
        variant: the class (tested with ranks 1 and 3 and every switch turned once), or one configured instance.
        oracle: the equations in NumPy float64, written independently of the variant, or a module with them (see
            ``Oracle``). Without one the formula itself is the reference.
        targets: targets to compare with eager, for the first configuration.
        hosts: the hosts. A method that names modules of a model needs one of its own: a ``Host`` with that model.
        **fields: hyper-parameters to set.
    """
    equations = Oracle.of(oracle) if isinstance(oracle, ModuleType) else oracle
    found: list[Check] = []
    for index, sample in enumerate(samples(variant, **fields)):
        admitted = functools.partial(_require_host, sample, hosts.values())
        found.append(Check(f"{describe_sample(sample)}-admitted", admitted))
        for host in hosts.values():
            case = Case(sample, host, equations)
            title = f"{describe_sample(sample)}-{host.name}"
            if not host.admits(sample):
                if not host.several:
                    found.append(Check(f"{title}-refused", functools.partial(checks.check_refused, case)))
                continue
            run = several.CHECKS if host.several else checks.CHECKS
            found += [Check(f"{title}-{name}", functools.partial(check, case)) for name, check in run.items()]
            if index == 0:
                run_on = several.TARGET_CHECKS if host.several else emitted.CHECKS
                found += [
                    Check(f"{title}-{target}-{name}", functools.partial(check, case, target))
                    for target in targets
                    for name, check in run_on.items()
                ]
    return found


def _require_host(sample: Variant, hosts: Iterable[ConformanceHost]) -> None:
    assert any(host.admits(sample) for host in hosts), (
        "no host admits this configuration: give smaller sizes, or hosts= a Host with the modules that it names"
    )
