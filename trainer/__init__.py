"""Lockstep: train a PyTorch model on any number of GPUs from one YAML file.

This module imports nothing heavy, so that `--help` and config errors answer at once; see `trainer.loop` for
the training loop and `trainer.config` for everything a YAML file can say.
"""
