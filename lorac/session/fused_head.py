"""TRL's fused head, within a call of the compiled model.

TRL's trainers assign another ``forward`` to the model they are given: with ``fused_lm_head=True`` it calls the model's
body, and multiplies with the head's weight chunk by chunk. On a compiled model that would go past the call, and so past
its adapters wherever a layer is recomputed.
"""

import functools
import types
from collections.abc import Mapping
from typing import Any

from lorac.errors import Unavailable
from lorac.ir.slots.plans import SitePlan


def install_fused_head(host: Any, forward: Any, plans: Mapping[str, SitePlan]) -> bool:
    """Run TRL's ``forward`` as that of the host; return False for any other.

    Args:
        host: the copy of the model that a call runs.
        forward: the function that was assigned to the compiled model. TRL's has the name and signature of the original.
        plans: site path -> its slots.

    Raises:
        Unavailable: an adapter changes the head.
    """
    fused: Any = getattr(forward, "__func__", None)
    code = getattr(fused, "__code__", None)
    if not (isinstance(code, types.CodeType) and "fused_lm_head" in code.co_varnames):
        return False
    head, plain = host.get_output_embeddings(), host.forward
    heads = {path for path, module in host.named_modules() if module is head}
    for path, plan in plans.items():
        if not plan.empty and (plan.site.within or path) in heads:
            raise Unavailable(
                f"an adapter changes '{path}', and TRL multiplies with the weight of the head itself",
                next_step=f"leave '{path}' out of the adapter's targets and of its modules_to_save",
            )

    @functools.wraps(plain)
    def switched(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        return fused(host, *args, fused_lm_head=True, **kwargs) if fused_lm_head else plain(*args, **kwargs)

    host.forward = switched
    return True
