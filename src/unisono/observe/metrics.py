"""metrics.jsonl, and TensorBoard where asked: one row an event, the step axis is optimizer steps.

Tags are Hugging Face's (`train/loss`, `train/learning_rate`, `train/grad_norm`, `train/epoch`,
`eval/loss`) plus `perf/*` and `comm/*`. Losses are global means per target token.
"""

import time
from pathlib import Path
from typing import Any

from unisono.files import JsonLines, truncate_after, up_to

FILE = "metrics.jsonl"


class Metrics:
    """The writer of rank 0. `from_step`: rows of later steps are dropped, they will be redone."""

    def __init__(self, run: Path, from_step: int, report_to: tuple[str, ...]) -> None:
        truncate_after(run / FILE, up_to(from_step))
        self._lines = JsonLines(run / FILE)
        self._board: Any = None
        if "tensorboard" in report_to:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=from_step + 1)

    def write(self, step: int, **values: float | int | str) -> None:
        """One row; names use a double underscore for the slash: train__loss."""
        row = {name.replace("__", "/"): value for name, value in values.items()}
        self._lines.append({"step": step, "time": round(time.time(), 3), **row})
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._lines.close()
        if self._board is not None:
            self._board.close()
