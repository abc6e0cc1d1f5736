"""Checks that the children of a copy's modules were not replaced, since programs are made from the original.

PEFT, trainers with ``peft_config=``, and libraries that quantise or fuse layers replace a model's children in place.
The base, the adapters, exports and artifacts of a compiled model would not contain the replacements.
"""

from torch import nn

from lorac.errors import Unavailable, list_some


class ChildModules:
    """The children of all modules of a copy, recorded when this object is built.

    Args:
        model: the copy.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(path, module) for path, module in model.named_modules() if module._modules]
        self._paths, self._now = [path for path, _ in named], [module._modules for _, module in named]
        self._first = [dict(children) for children in self._now]

    def check(self) -> None:
        """Refuse a copy whose children were replaced since; a wrapped child, as by ``torch.compile``, is allowed.

        Raises:
            Unavailable: naming the replaced children.
        """
        if self._now == self._first:  # compares identities, about 50 ns per module with children
            return
        replaced: dict[str, nn.Module | None] = {}
        for path, children, first in zip(self._paths, self._now, self._first, strict=True):
            for name, child in first.items():
                now = children.get(name)
                if child is None or now is child:
                    continue
                wraps = now is not None and any(one is child for one in now.modules())
                if now is None or not wraps or {*map(id, now.parameters())} != {*map(id, child.parameters())}:
                    replaced[f"{path}.{name}".removeprefix(".")] = now
        if not replaced:
            self._first = [dict(children) for children in self._now]
            return
        kinds = {
            "nothing" if child is None else f"{type(child).__module__.partition('.')[0]}'s {type(child).__name__}"
            for child in replaced.values()
        }
        raise Unavailable(
            f"{list_some(sorted(replaced), 3)} of a compiled model became {', '.join(sorted(kinds))}, "
            "which its adapters, exports and artifacts do not have",
            next_step="change the original model and compile it again; for an adapter of PEFT's, give its folder or "
            "configuration in adapters=",
        )
