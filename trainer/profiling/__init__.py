"""Traces of a few steps: `recording` writes them, `finding` makes tables of one, as `traces` reads it.

What those of all ranks say together is `summary`.
"""
