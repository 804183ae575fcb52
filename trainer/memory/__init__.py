"""What a training step keeps in memory: predicted, measured, made to fit, and what happens where it does not."""
