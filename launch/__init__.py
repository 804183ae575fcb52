"""Starting a training job: on this machine now, on many later. Training itself is in `trainer`."""
