"""Runs at the start of every Python with this folder on PYTHONPATH: ignores a key of the config if it is told to."""

import os

if os.environ.get("LOCKSTEP_TEST_IGNORED_KEY"):
    import ignoring

    ignoring.install()
