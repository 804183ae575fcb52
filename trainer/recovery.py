"""What a run does about bad numbers: it ends, or goes back to its last checkpoint and leaves a batch out.

Owns what becomes of the run (`faults.non_finite`). Which numbers are bad is judged by `trainer.faults.numbers`; a step
that is left out on the device is `trainer.update`.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from trainer.faults.fault import Fault
from trainer.faults.numbers import BadNumbers
from trainer.observed import Observed

logger = logging.getLogger("lockstep")


class Recovery:
    """Recovers a run from bad numbers; all ranks call its methods together.

    Args:
        run: built.
    """

    def __init__(self, run: Observed) -> None:
        self._run = run

    def is_due(self) -> bool:
        """Waits until the last step is judged, and tells whether any rank must not go on with it."""
        numbers = self._run.numbers
        if numbers.policy == "skip":
            return False
        numbers.settle()
        return any(self._run.runtime.gather(numbers.is_alarmed))

    def recover(self) -> None:
        """Does what `faults.non_finite` says.

        Raises:
            BadNumbers: the run is not to go on.
        """
        run = self._run
        run.decisions.forget()
        run.numbers.settle()
        faults = run.config.faults
        bad = run.note_bad_steps()[0]
        message = bad.message
        if faults.non_finite == "rollback":
            if run.progress.num_rollbacks < faults.max_rollbacks:
                self._roll_back(bad)
                return
            message += f"; faults.max_rollbacks ({faults.max_rollbacks}) are used up"
        elif not run.numbers.wants_gradient_norm and run.config.optim.clip_norm is None:
            message += ", or of the step before: gradients were not looked at"
        run.saver.wait()
        stands = run.saver.saved_step
        stands_text = f"the checkpoint of step {stands} stands" if stands is not None else "there is no checkpoint yet"
        raise BadNumbers(replace(bad, message=f"{message}; {stands_text}"))

    def _roll_back(self, bad: Fault) -> None:
        """Goes back to the last checkpoint, and leaves the batch of a step out from then on."""
        run = self._run
        assert bad.step is not None
        before = run.progress
        run.at("restoring a checkpoint")
        with run.clock.phase("checkpoint"):
            run.saver.wait()
            checkpoint = run.checkpoints.choose(run.runtime)
            if checkpoint is None:
                raise BadNumbers(replace(bad, message=f"{bad.message}; there is no checkpoint to go back to"))
            run.load(checkpoint)
            run.saver.saved_step = checkpoint.step
            progress = run.progress
            progress.num_rollbacks = before.num_rollbacks + 1
            progress.avoided_steps = sorted({*before.avoided_steps, bad.step - 1})
            progress.wandb_id = before.wandb_id
            run.numbers.forget()
            run.feed.start(run.sampler, progress.step, run.total_steps)
            if run.reporter is not None:
                run.folder.cut_metrics(progress.step, progress.evaluated_step)
        if run.ledger is not None:
            run.ledger.rolled_back(before.step, progress.step, *run.times())
        run.save()  # of the same step, so that only the progress is new: the next attempt avoids that batch, too
        run.measure_from_here()
        logger.warning("going back to step %d, and leaving out the batch of step %d", progress.step, bad.step)
