"""Traces of a few steps: `recording` writes them, `traces` reads one, `summary` tells what those of all ranks say."""
