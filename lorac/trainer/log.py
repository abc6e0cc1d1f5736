"""The log of a run for people: a line for each entry, and a picture of its losses."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

_SHOWN = ("loss", "eval_loss", "eval_accuracy", "reward", "grad_norm", "learning_rate")
_WIDTH, _HEIGHT, _EDGE = 640, 320, 40
_COLORS = {"loss": "#1f77b4", "eval_loss": "#d62728"}


class LogLines(TrainerCallback):
    """Prints a line for each entry of the log, with the time that is left."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begun, self._first = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        shown = [f"{name} {float(logs[name]):.4g}" for name in _SHOWN if name in (logs or {})] if logs else []
        if shown and state.is_world_process_zero:
            rate = (state.global_step - self._first) / max(time.monotonic() - self._begun, 1e-9)
            left = int((state.max_steps - state.global_step) / rate) if rate else 0
            pace = f"{rate:.2g} steps/s, {left // 60}:{left % 60:02} left"
            print(f"step {state.global_step}/{state.max_steps}: {', '.join(shown)} ({pace})", flush=True)


def draw_losses(history: Sequence[Mapping[str, Any]]) -> str:
    """Return an SVG picture of the losses over the steps of a trainer's log, in training and in evaluation."""
    found = {name: [(one["step"], one[name]) for one in history if name in one] for name in _COLORS}
    points = [point for line in found.values() for point in line if abs(point[1]) < float("inf")]
    steps, losses = ([point[i] for point in points] or [0] for i in (0, 1))
    low, high = min(losses), max(losses)
    wide, tall = (_WIDTH - 2 * _EDGE) / max(*steps, 1), (_HEIGHT - 2 * _EDGE) / ((high - low) or 1)
    text = [
        f'<text x="2" y="{_EDGE}">{high:.4g}</text><text x="2" y="{_HEIGHT - _EDGE}">{low:.4g}</text>',
        f'<text x="{_WIDTH - _EDGE}" y="{_HEIGHT - 8}" text-anchor="end">step {max(steps)}</text>',
    ]
    for at, (name, line) in enumerate((name, line) for name, line in found.items() if line):
        path = " ".join(f"{_EDGE + x * wide:.1f},{_HEIGHT - _EDGE - (y - low) * tall:.1f}" for x, y in line)
        text.append(f'<polyline fill="none" stroke="{_COLORS[name]}" points="{path}"/>')
        text.append(f'<text x="{_EDGE + 90 * at}" y="20" fill="{_COLORS[name]}">{name}</text>')
    size = f'width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(text)}</svg>\n'
