"""A frozen base in parts: each of several processes keeps a share of its weights (FSDP2), and the adapters whole.

    compiled = lorac.compile(model, adapters).train()
    shard_base(compiled)
    wrapped = DistributedDataParallel(compiled)  # as Trainer and accelerate do; it reduces the adapters' gradients
    ...
    with gather_base(compiled):
        lorac.save_adapter(compiled.adapters["a"], "a", model=model)

A private function of torch's is used here alone: the names that DDP leaves out.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lorac.errors import Unavailable, check_known
from lorac.frontend.components import is_in_parts
from lorac.training.rule import require_trainable, spans_processes


def shard_base(*compiled: nn.Module, layers: Collection[str] = (), reshard_after_forward: bool = True) -> None:
    """Leave in each process its share of the base's weights; a call gathers those of one layer at a time.

    The original model is in parts then, too (``gather_base``). Every process of the default group has to call this.

    Args:
        compiled: the result of ``lorac.compile(..., target="eager")``, in no wrapper yet; several, where these share
            the base.
        layers: classes of the modules that are gathered at once; default: those that the model's class names.
        reshard_after_forward: let go of a layer's weights after its forward pass, until its backward pass.

    Raises:
        Unavailable: there is one process; the base is quantised, trains, or is in parts; or the model has no layers.
        OptionError: the model has no module of such a class.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = require_trainable(compiled[0])
    tensors = dict(model.host.named_parameters(remove_duplicate=False))
    packed = [path for path, site in model.session.view.sites.items() if site.packed]
    reasons = {
        "there is one process, and torchrun --nproc-per-node 2 starts two": not spans_processes(),
        f"'{packed[0] if packed else ''}' is quantised": packed,
        f"its mode is {model.mode!r}, and not 'live'": model.mode != "live",
        "it is already": any(map(is_in_parts, tensors.values())),
        "some of its weights train": any(tensor.requires_grad for tensor in tensors.values()),
    }
    if reason := next((text for text, holds in reasons.items() if holds), None):
        raise Unavailable(
            f"the base cannot be split between processes: {reason}",
            next_step="leave out fsdp: DistributedDataParallel trains with a whole base",
        )
    found = {type(module).__name__ for module in model.host.modules()}
    check_known(layers, found, "the model has no layers of the class")
    kinds = {*layers} or {*(getattr(model.host, "_no_split_modules", None) or ())} & found
    if not kinds:
        what = f"{type(model.host).__name__} does not say which of its modules are layers"
        raise Unavailable(what, next_step="name their classes: layers=")
    mesh = init_device_mesh(next(iter(tensors.values())).device.type, (torch.distributed.get_world_size(),))
    for one in compiled:
        host: Any = one.host
        for module in [module for module in host.modules() if type(module).__name__ in kinds] + [host]:
            fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward)
        kept = [name for name, tensor in one.named_parameters() if is_in_parts(tensor)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(one, kept)
    for tensor in tensors.values():  # the whole ones, which records of sites still know by identity
        tensor.data = tensor.new_empty(0)
    _hand_over(model)


@contextmanager
def gather_base(compiled: nn.Module) -> Iterator[None]:
    """Give the model that was compiled its whole weights within the block, to save adapters, merge or compile again.

    Every process has to enter it. The compiled model stays in parts.
    """
    model = require_trainable(compiled)
    _hand_over(model, whole=True)
    try:
        yield
    finally:
        _hand_over(model)


def _hand_over(compiled: Any, *, whole: bool = False) -> None:
    """Give the base of a compiled model the tensors in parts of its host, or whole copies."""
    base = compiled.session.view.module
    for name, tensor in compiled.host.named_parameters(remove_duplicate=False):
        if is_in_parts(tensor):
            path, _, own = name.rpartition(".")
            gathered = nn.Parameter(tensor.full_tensor(), requires_grad=False) if whole else tensor
            base.get_submodule(path)._parameters[own] = gathered
