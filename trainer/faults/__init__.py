"""What ends a run early, and what is done about it: stop requests, dead, hung and slow ranks, bad numbers.

`stopping` collects requests to stop; `watch` (with `judging`, `links`, `wire`, `neighbours`, `board`, `stacks`) knows
which rank is alive and where it stands; `fault` is what is written down when something happens; `numbers` judges losses
and gradients; `pace` finds slow ranks; `injection` makes things go wrong on purpose, by a `plan`; `lookout` puts all of
it at the places that the loop comes through.
"""
