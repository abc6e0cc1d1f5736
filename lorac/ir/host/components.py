"""Several models as one host: an adapter may span them, and one swap switches them all."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorac.errors import ChoiceError, nearest_name


class Models(nn.ModuleDict):
    """Models by name; paths of sites begin with it. Called with the name of one, then as that one is."""

    def forward(self, model: str, /, *args: Any, **kwargs: Any) -> Any:
        """What the model of that name answers.

        Raises:
            ChoiceError: there is none.
        """
        if not isinstance(model, str) or model not in self:
            what = f"'{model}'" if isinstance(model, str) else f"a {type(model).__name__}"
            raise ChoiceError(
                f"{what} is the name of none of these models",
                nearest=nearest_name(str(model), self) or ", ".join(self),
                next_step=f"call one of them: compiled['{next(iter(self), '')}'](...)",
            )
        return self[model](*args, **kwargs)
