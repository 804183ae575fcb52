"""What ends a run early, and what is done about it: stop requests, dead, hung and slow ranks, bad numbers.

`stopping` collects requests to stop, `watch` knows which rank is alive and where it stands, `fault` is what is written
down when something happens, `numbers` judges losses and gradients, `injection` makes things go wrong on purpose.
"""
