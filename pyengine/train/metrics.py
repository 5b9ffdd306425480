"""`metrics.jsonl`, one line a step, and the plot of the loss. The file is the source of truth; the plot is drawn from it.

Keys: `step` (optimizer steps done), `tokens` (trained on so far), `train/loss` and `eval/loss` (nats per target),
`train/grad_norm` (before clipping), `train/learning_rate`, `train/tokens_per_second`. A number that is not finite is the
text "NaN", "Infinity" or "-Infinity".
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from pyengine.formats.atomic import atomic_write

FILE_NAME = "metrics.jsonl"
PLOT_NAME = "loss.png"

Value = int | float


class MetricsLog:
    """Appends to `folder`/metrics.jsonl.

    Args:
        folder: the run folder.
        resume_step: lines of later steps, which a run that died may have left, are cut off; 0 starts a new file.
    """

    def __init__(self, folder: str | os.PathLike[str], *, resume_step: int = 0) -> None:
        self.path = Path(folder) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in read_metrics(folder) if entry["step"] <= resume_step] if resume_step else []
        with atomic_write(self.path) as file:
            for entry in kept:
                file.write(_encode(entry))
        self._file = self.path.open("ab", buffering=0)

    def write(self, values: Mapping[str, Value]) -> None:
        """Append one line; `values` must have `step`."""
        self._file.write(_encode(values))

    def close(self) -> None:
        self._file.close()


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Value]]:
    """All whole lines of `folder`/metrics.jsonl, none where there is no file. A torn last line is left out."""
    path = Path(folder) / FILE_NAME
    if not path.exists():
        return []
    entries = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        entry = msgspec.json.decode(line, type=dict[str, int | float | str])
        entries.append({key: float(value) if isinstance(value, str) else value for key, value in entry.items()})
    return entries


def plot_loss(folder: str | os.PathLike[str]) -> Path:
    """Draw training and evaluation loss and the learning rate over the step into `folder`/loss.png. Needs matplotlib."""
    from matplotlib.figure import Figure

    entries = read_metrics(folder)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per token")
    rate_axes = axes.twinx()
    rate_axes.set_ylabel("learning rate")
    for key, target, style in (
        ("train/loss", axes, {"linewidth": 1.0}),
        ("eval/loss", axes, {"marker": "o", "markersize": 3.0}),
        ("train/learning_rate", rate_axes, {"color": "0.7", "linestyle": ":"}),
    ):
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        if points:
            steps, values = zip(*points, strict=True)
            target.plot(steps, values, label=key, **style)
    lines = [*axes.get_lines(), *rate_axes.get_lines()]
    if lines:
        axes.legend(handles=lines)
    path = Path(folder) / PLOT_NAME
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return path


def _encode(values: Mapping[str, Value]) -> bytes:
    plain = {key: value if math.isfinite(value) else _NAMES[str(value)] for key, value in values.items()}
    return msgspec.json.encode(plain) + b"\n"


_NAMES = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
