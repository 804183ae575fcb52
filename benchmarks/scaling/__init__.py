"""Scaling: a model of a step on many GPUs, its check by measured runs, and one rank of many that are not running.

`model` has the formulas, `constants` what they are fed with, `jobs` the recipes, `check` the measured runs, `simulated`
the ranks that are not there, `report` the tables and the plot. `python -m benchmarks.scaling` does all of it.
"""

from benchmarks.scaling.report import plot, table

__all__ = ["plot", "table"]
