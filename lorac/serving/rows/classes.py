"""The classes of rows, of a model that classifies sequences."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from lorac.errors import Unavailable
from lorac.frontend.components import MAIN_GRAPH
from lorac.ir.slots.choice import ChoiceSpec, parse_choice
from lorac.serving.served_model import ServedModel
from lorac.session.compiled import Compiled


def classify_rows(
    compiled: ServedModel, outputs: Mapping[str, Tensor], choices: Sequence[ChoiceSpec], *, probabilities: bool
) -> list[object]:
    """Return the class of each row as vLLM does: its index, label and probabilities.

    Args:
        outputs: of the model, with logits (rows, classes), −inf beyond the classes of a row.
        choices: of adapters, one per row.
        probabilities: whether to give these, or the logits.

    Raises:
        Unavailable: the model does not classify sequences.
    """
    config, logits = compiled.traits[MAIN_GRAPH].config, outputs.get("logits")
    if logits is None or logits.dim() != 2:
        raise Unavailable(
            f"the model gives no class for each text, but {', '.join(outputs)}",
            next_step="serve a model for sequence classification; /v1/predict gives any model's outputs",
        )
    found = list[object]()
    for index, (row, choice) in enumerate(zip(logits.float(), choices, strict=True)):
        own = row[row > -math.inf]
        labels, best = _list_labels(compiled, choice, len(own)), int(own.argmax())
        independent = len(own) == 1 or getattr(config, "problem_type", None) == "multi_label_classification"
        values = own if not probabilities else own.sigmoid() if independent else own.softmax(0)
        found.append({"index": index, "label": labels[best], "probs": values.tolist(), "num_classes": len(own)})
    return found


def _list_labels(compiled: ServedModel, choice: ChoiceSpec, count: int) -> Sequence[str]:
    """Return the labels of a choice's adapter, else those of the model, if they are as many as its classes."""
    own = getattr(compiled.traits[MAIN_GRAPH].config, "id2label", None) or {}
    known: list[Sequence[str]] = [
        [str(own[key]) for key in sorted(own, key=int)],
        [f"LABEL_{place}" for place in range(count)],
    ]
    if isinstance(compiled, Compiled):
        known = [*(compiled.pool[name].labels for name, _ in parse_choice(choice, compiled.pool)), *known]
    return next(labels for labels in known if len(labels) == count)
