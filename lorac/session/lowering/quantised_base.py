"""The difference between an emitted program's base and a model whose weights another library has quantised."""

from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lorac.errors import warn
from lorac.frontend.capture.export import isolate_tracing
from lorac.frontend.components import list_components
from lorac.frontend.host import Host
from lorac.frontend.model_runner import ModelRunner
from lorac.frontend.quantised_weights import iter_quantised_origins
from lorac.ir.calls.call import Call
from lorac.ir.calls.output_structure import replace_dataclasses
from lorac.ir.graph.interpreter import differs_beyond_rounding, relative_error
from lorac.session.lowering.lower import find_component_example
from lorac.session.session import Session


def warn_of_quantised_products(session: Session, given: nn.Module) -> None:
    """Warn where the library's matrix products differ from a program's, with float inputs and dequantised weights.

    Unless ``self_test`` is off, both models run on the example inputs to measure the difference.

    Args:
        session: the session of the model with dequantised weights.
        given: the model with the library's weights and products; left as it was.
    """
    origins = dict(iter_quantised_origins(session.host.module))
    if not origins:
        return
    rounding = [name for name, origin in origins.items() if origin.rounds_inputs]
    pairs = _compute_outputs(session, given) if session.options.self_test else []
    if not rounding and not any(differs_beyond_rounding(*pair) for pair in pairs):
        return
    name, *others = rounding or origins
    does = "round their inputs" if rounding else "are not those with the float values"
    error = max((relative_error(*pair) for pair in pairs), default=None)
    by = "that rounding" if error is None else f"{error:.1e} of their norm on the example inputs"
    warn(
        f"products with {1 + len(others)} weights of the model {does} ('{name}'), and those of the program "
        f"{'do not' if rounding else 'are'}: outputs differ by {by}",
        next_step="use target='eager' for the model's own products",
    )


def _compute_outputs(session: Session, given: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of outputs: with dequantised weights, and of the given model; empty if either does not run."""
    found: list[tuple[Tensor, Tensor]] = []
    try:
        for name, component in list_components(session.host.module).items():
            own = list_components(given)[name]
            inputs = Host.of(own).bind(find_component_example(session, "example_inputs", name))
            fitted: Any = session.precision.fit(inputs)
            with isolate_tracing(own):
                runs = [
                    ModelRunner(model).run(Call((), one)).output for model, one in ((component, fitted), (own, inputs))
                ]
            leaves = zip(*map(pytree.tree_leaves, map(replace_dataclasses, runs)), strict=True)
            found += [(y, ref) for y, ref in leaves if isinstance(y, Tensor) and isinstance(ref, Tensor)]
    except Exception:  # the library's kernels may not run here, and the capture names inputs that are wrong
        return []
    return found
