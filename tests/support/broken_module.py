"""Named in a config by a test: importing it fails."""

raise RuntimeError("this module cannot be imported")
