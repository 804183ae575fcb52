"""Rules about what interrupts the steps: checkpoints and evaluations."""

from __future__ import annotations

import math

from trainer.advice.measured import Advice, Measured, Setting, Unit, line, percent, speed_up
from trainer.units import format_bytes

SAVES = 0.04  # of the time in checkpoints; written behind the training they take next to nothing
_SAVES_AFTER = 0.02  # of the time that rarer checkpoints may still take
_DUE = 0.5  # of the saves: with fewer by the interval it is not the interval that makes them many
_EVALUATIONS = 0.2  # of the time; some of it is wanted
_EVALUATIONS_AFTER = 0.1  # that rarer evaluations take
_BETWEEN = 1.25  # times what a write takes, from one save to the next, so that no save waits for the last one
_LEAST_GAIN = 0.02
_LEAST_TRAINING = 1e-3  # of the time, at least, between pauses


def checkpoints(measured: Measured) -> Advice | None:
    """The training waits for checkpoints."""
    share, pauses = measured.share("checkpoint"), measured.pauses
    if share < SAVES or pauses.num_saves == 0:
        return None
    stall = share * measured.seconds / pauses.num_saves
    begin = f"Checkpoints took {percent(share)} of the time, {_seconds(stall)} each."
    if pauses.lacks_memory:
        begin += " The host had no memory for a copy of the state, so that each was waited for."
    if pauses.is_async or not _has_room_for_copy(measured):
        return _rarer_saves(measured, begin, stall)
    settings: dict[str, Setting] = {"checkpoint.async_save": True}
    text = f"{begin} Write them behind the training: set {line(settings)}, which takes "
    text += f"{format_bytes(pauses.copy_bytes)} of host memory on each rank for a copy of the state."
    if pauses.copy_seconds is None:
        return Advice("checkpoints", f"{text} How long the copy takes was not tried.", settings, None, share)
    # What stays is the copy, and where a write takes longer than the steps until the next save, the rest of it.
    training = _training_seconds(measured, "checkpoint") / pauses.num_saves
    left = max(pauses.copy_seconds, pauses.write_seconds - training)
    saved = share * max(1 - left / stall, 0.0)
    if speed_up(saved) < _LEAST_GAIN:
        return _rarer_saves(measured, begin, stall)
    if left > pauses.copy_seconds:
        text += f" A write takes longer than the {_seconds(training)} until the next one, so that some waiting stays."
    return Advice("checkpoints", text, settings, speed_up(saved), share)


def _has_room_for_copy(measured: Measured) -> bool:
    free = measured.host.free_memory
    return free is None or measured.pauses.copy_bytes < free


def _rarer_saves(measured: Measured, begin: str, stall: float) -> Advice | None:
    """Changes the interval; saves of new best results come all the same."""
    share, pauses = measured.share("checkpoint"), measured.pauses
    if pauses.num_due == 0 or pauses.num_due < _DUE * pauses.num_saves:
        return None
    whole = _training_seconds(measured, "checkpoint")
    between = whole / pauses.num_due  # of those that the interval makes
    # A save waits until the one before it is written, and for its own copy; without a copy, until all is done.
    is_behind = pauses.is_async and not pauses.lacks_memory
    late = min(max(pauses.write_seconds - whole / pauses.num_saves, 0.0), stall) if is_behind else 0.0
    copy = stall - late
    is_late = late > copy
    by_copy = copy / between * (1 - _SAVES_AFTER) / _SAVES_AFTER
    factor = _BETWEEN * pauses.write_seconds / between if is_late else by_copy
    found = _rounded(measured, pauses.save_every, factor, pauses.save_unit)
    if found is None:
        return None
    every, times = found
    after = pauses.num_due / times * copy + (pauses.num_saves - pauses.num_due) * stall
    gain = measured.seconds / (whole + after) - 1
    if gain < _LEAST_GAIN:
        return None
    settings: dict[str, Setting] = {"checkpoint.every": every}
    why = "A save waits until the one before it is written"
    why += f", which takes {_seconds(pauses.write_seconds)}, and one is due every {_seconds(between)}"
    text = f"{begin} {why}: " if is_late else f"{begin} Save less often: "
    text += f"set {line(settings)}. A run that is killed then loses up to {_seconds(times * between)} of work."
    return Advice("checkpoints", text, settings, gain, share)


def evaluations(measured: Measured) -> Advice | None:
    """Evaluating takes much of the time."""
    share, pauses = measured.share("evaluation"), measured.pauses
    if share < _EVALUATIONS or pauses.num_evaluations == 0:
        return None
    seconds = share * measured.seconds / pauses.num_evaluations
    training = _training_seconds(measured, "evaluation") / pauses.num_evaluations
    factor = seconds / training * (1 - _EVALUATIONS_AFTER) / _EVALUATIONS_AFTER
    found = _rounded(measured, pauses.evaluate_every, factor, pauses.evaluate_unit)
    if found is None:
        return None
    every, times = found
    gain = (training + seconds) / (training + seconds / times) - 1
    if gain < _LEAST_GAIN:
        return None
    settings: dict[str, Setting] = {"eval.every": every}
    text = (
        f"Evaluations took {percent(share)} of the time, {_seconds(seconds)} each after {_seconds(training)} of "
        f"training: set {line(settings)}. The best checkpoint is then chosen among fewer."
    )
    return Advice("evaluations", text, settings, gain, share)


def _training_seconds(measured: Measured, pause: str) -> float:
    """Returns the time of the stretch without that of a pause."""
    return measured.seconds * max(1 - measured.share(pause), _LEAST_TRAINING)


def _rounded(measured: Measured, every: float, factor: float, unit: Unit) -> tuple[Setting, float] | None:
    """Returns an interval that is at least so many times as long, as it is written, and how many times it really is.

    It ends with the run: longer ones do nothing more. None where it would be no longer than it is.
    """
    most = measured.run_length(unit)
    if unit == "minutes":
        count = min(math.ceil(10 * every * factor - 1e-6), math.ceil(10 * most)) / 10
        return (f"{count:g} minutes", count / every) if count > every else None
    whole = min(math.ceil(every * factor - 1e-6), math.ceil(most))
    return (whole if unit == "steps" else f"{whole} epochs", whole / every) if whole > every else None


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
