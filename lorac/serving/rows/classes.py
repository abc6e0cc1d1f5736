"""The classes that a model for sequence classification gives to rows."""

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
    """Return each row's index, label, probabilities and number of classes, in vLLM's form.

    Args:
        outputs: the model's outputs, with logits (rows, classes), padded with −inf beyond the classes of a row.
        choices: the choices of adapters, one per row.
        probabilities: return probabilities; else logits.

    Raises:
        Unavailable: the model does not classify sequences.
    """
    config, logits = compiled.traits[MAIN_GRAPH].config, outputs.get("logits")
    if logits is None or logits.dim() != 2:
        raise Unavailable(
            f"the model gives no class for each text, but {', '.join(outputs)}",
            next_step="serve a model for sequence classification; /v1/predict gives any model's outputs",
        )
    found, named = list[object](), getattr(config, "id2label", None) or {}
    for index, (row, choice) in enumerate(zip(logits.float(), choices, strict=True)):
        own = row[row > -math.inf]
        known: list[Sequence[str]] = [[str(named[key]) for key in sorted(named, key=int)]]
        if isinstance(compiled, Compiled):
            known[:0] = [compiled.pool[name].labels for name, _ in parse_choice(choice, compiled.pool)]
        best, usual = int(own.argmax()), [f"LABEL_{place}" for place in range(len(own))]
        labels = next((labels for labels in known if len(labels) == len(own)), usual)
        independent = len(own) == 1 or getattr(config, "problem_type", None) == "multi_label_classification"
        values = own if not probabilities else own.sigmoid() if independent else own.softmax(0)
        found.append({"index": index, "label": labels[best], "probs": values.tolist(), "num_classes": len(own)})
    return found
