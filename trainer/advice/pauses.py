"""Rules about what interrupts the steps: checkpoints and evaluations."""

from __future__ import annotations

import math

from trainer.advice.measured import Advice, Measured, Setting, line, percent, speed_up

_SAVES = 0.04  # of the time in checkpoints; written behind the training they take next to nothing
_SAVES_AFTER = 0.02  # of the time that rarer checkpoints may still take
_EVALUATIONS = 0.2  # of the time; some of it is wanted
_EVALUATIONS_AFTER = 0.1  # that rarer evaluations take
_BETWEEN = 1.25  # times what a write takes, from one save to the next, so that no save waits for the last one
_LEAST_GAIN = 0.02


def checkpoints(measured: Measured) -> Advice | None:
    """The training waits for checkpoints."""
    share, pauses = measured.share("checkpoint"), measured.pauses
    if share < _SAVES or pauses.num_saves == 0:
        return None
    stall = share * measured.seconds / pauses.num_saves
    training = (1 - share) * measured.seconds / pauses.num_saves  # from one save to the next
    begin = f"Checkpoints took {percent(share)} of the time, {_seconds(stall)} each."
    if pauses.is_async:
        return _rarer_saves(measured, begin, stall, training)
    # What stays is the copy, and where a write takes longer than the steps until the next save, the rest of it.
    left = max(pauses.copy_seconds, pauses.write_seconds - training)
    saved = share * max(1 - left / stall, 0.0)
    if speed_up(saved) < _LEAST_GAIN:
        return _rarer_saves(measured, begin, stall, training)
    settings: dict[str, Setting] = {"checkpoint.async_save": True}
    text = f"{begin} Write them behind the training: set {line(settings)}."
    if left > pauses.copy_seconds:
        text += f" A write takes longer than the {_seconds(training)} until the next one, so that some waiting stays."
    return Advice("checkpoints", text, settings, speed_up(saved), share)


def _rarer_saves(measured: Measured, begin: str, stall: float, training: float) -> Advice | None:
    share, pauses = measured.share("checkpoint"), measured.pauses
    # A save waits until the one before it is written, and for its own copy; without async_save, until all is done.
    late = min(max(pauses.write_seconds - training, 0.0), stall) if pauses.is_async else 0.0
    copy = stall - late
    by_write = _BETWEEN * pauses.write_seconds / training if pauses.is_async else 1.0
    by_copy = copy / training * (1 - _SAVES_AFTER) / _SAVES_AFTER
    is_late = late > copy
    every, times = _rounded(pauses.save_every, max(by_write if is_late else by_copy, 1.0), pauses.save_unit)
    # Saves of new best results come all the same, and then find the last one written.
    rarer = pauses.num_due / pauses.num_saves
    before = 1 + stall / training
    after = 1 + copy / training * (rarer / times + 1 - rarer)
    gain = before / after - 1
    if gain < _LEAST_GAIN:
        return None
    settings: dict[str, Setting] = {"checkpoint.every": every}
    why = "A save waits until the one before it is written"
    why += f", which takes {_seconds(pauses.write_seconds)}, and one is due every {_seconds(training)}"
    text = f"{begin} {why}: " if is_late else f"{begin} Save less often: "
    text += f"set {line(settings)}. A run that is killed then loses up to {_seconds(times * training)} of work."
    return Advice("checkpoints", text, settings, gain, share)


def evaluations(measured: Measured) -> Advice | None:
    """Evaluating takes much of the time."""
    share, pauses = measured.share("evaluation"), measured.pauses
    if share < _EVALUATIONS or pauses.num_evaluations == 0:
        return None
    seconds = share * measured.seconds / pauses.num_evaluations
    training = (1 - share) * measured.seconds / pauses.num_evaluations
    factor = seconds / training * (1 - _EVALUATIONS_AFTER) / _EVALUATIONS_AFTER
    every, times = _rounded(pauses.evaluate_every, factor, pauses.evaluate_unit)
    gain = (training + seconds) / (training + seconds / times) - 1
    settings: dict[str, Setting] = {"eval.every": every}
    text = (
        f"Evaluations took {percent(share)} of the time, {_seconds(seconds)} each after {_seconds(training)} of "
        f"training: set {line(settings)}. The best checkpoint is then chosen among fewer."
    )
    return Advice("evaluations", text, settings, gain, share)


def _rounded(every: float, factor: float, unit: str) -> tuple[Setting, float]:
    """Returns an interval that is at least so many times as long, as it is written, and how many times it really is."""
    if unit == "minutes":
        count = math.ceil(10 * every * factor - 1e-6) / 10
        return f"{count:g} minutes", count / every
    whole = math.ceil(every * factor - 1e-6)
    return (whole if unit == "steps" else f"{whole} epochs"), whole / every


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
