"""What the planner found, as text: what one setting takes, and how settings compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.memory.planner import Prediction
from trainer.units import format_bytes

_ORDER = (
    "parameters",
    "buffers",
    "gradients",
    "optimizer",
    "averages",
    "activations",
    "inputs",
    "feed",
    "communication",
    "temporary",
)


@dataclass(frozen=True)
class Row:
    """One setting of a comparison; without a prediction where none of its micro-batches fits."""

    checkpointing: str
    strategy: str
    prediction: Prediction | None


def parts_table(prediction: Prediction, limit_bytes: int | None = None) -> str:
    """Returns what the memory of one device is at the peak, a line per part."""
    names = [name for name in _ORDER if prediction.parts.get(name)]
    lines = [f"  {name:<14}{format_bytes(prediction.parts[name]):>12}" for name in names]
    peak = f"  {'peak':<14}{format_bytes(prediction.peak_bytes):>12}"
    if limit_bytes is not None:
        verdict = "fits" if prediction.peak_bytes <= limit_bytes else "does not fit"
        peak += f"   {verdict}: {format_bytes(limit_bytes)} to use"
    return "\n".join([*lines, peak])


def settings_table(rows: Sequence[Row], share: int) -> str:
    """Returns the largest micro-batch that fits for each setting, with its peak and its relative time.

    Args:
        rows: the settings.
        share: samples per process and optimizer step.
    """
    found = [row.prediction for row in rows if row.prediction is not None]
    fastest = min((p.step_seconds for p in found), default=1.0)
    lines = [f"  {'checkpointing':<15}{'strategy':<10}{'micro-batch':>12}{'accumulated':>13}{'peak':>12}{'time':>8}"]
    for row in rows:
        start = f"  {row.checkpointing:<15}{row.strategy:<10}"
        p = row.prediction
        if p is None:
            lines.append(f"{start}{'does not fit':>12}")
            continue
        times = f"{share // p.micro_batch_size}x"
        relative = f"{p.step_seconds / fastest:.2f}"
        lines.append(f"{start}{p.micro_batch_size:>12}{times:>13}{format_bytes(p.peak_bytes):>12}{relative:>8}")
    return "\n".join(lines)


def config_lines(prediction: Prediction) -> str:
    """Returns the overrides that set what was found."""
    return f"train.micro_batch_size={prediction.micro_batch_size} memory.checkpointing={prediction.checkpointing}"
