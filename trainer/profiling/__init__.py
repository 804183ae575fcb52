"""Traces of a few steps: `recording` writes them, `finding` makes tables of one, as `traces` reads it, and `summary` tells
what those of all ranks say together.
"""
