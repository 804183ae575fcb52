"""Checkpoints: one format for every strategy, published whole or not at all.

`checkpoints/step-00001000/` holds one safetensors file per rank and `manifest.json`, which is written last: it names
every file with its size and checksum, every tensor with the files that its parts are in, and all that is not a tensor.
What is where: `state` (what a run consists of), `layout` (who writes what, and where in a file), `writing` (the copy,
the thread behind the step, the commit), `manifest`, `storage` (a folder or an object store), `reading`, `folder` (which
checkpoints there are, verify and keep), `compatibility` (what may change between two starts of a run).
"""
