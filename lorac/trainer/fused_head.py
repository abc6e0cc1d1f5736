"""TRL's fused head, within a call of the compiled model.

TRL's trainers replace the ``forward`` of the model they are given by one that calls the model's body and multiplies
with the head's weight, chunk by chunk. On a compiled model that goes past the call: nothing is prepared for branches,
a gradient checkpoint would recompute without adapters, and adapters at the head would do nothing.
"""

from __future__ import annotations

import functools
from typing import Any

from lorac.errors import Unavailable
from lorac.session.compiled import CompiledModule


def move_fused_head(compiled: CompiledModule) -> None:
    """Install on the host what TRL has installed on the compiled model, if it has.

    Raises:
        Unavailable: an adapter changes the head.
    """
    fused = vars(compiled).pop("forward", None)
    if fused is None:
        return
    host: Any = compiled.host
    plain = host.forward
    head = host.get_output_embeddings()
    heads = {path for path, module in host.named_modules() if module is head}
    for path, plan in compiled.plans.items():
        if not plan.empty and (plan.site.within or path) in heads:
            raise Unavailable(
                f"an adapter changes '{path}', and TRL multiplies with the weight of the head itself",
                next_step=f"leave '{path}' out of the adapter's targets and of its modules_to_save",
            )

    @functools.wraps(plain)
    def forward(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        return fused.__func__(host, *args, fused_lm_head=True, **kwargs) if fused_lm_head else plain(*args, **kwargs)

    host.forward = forward
