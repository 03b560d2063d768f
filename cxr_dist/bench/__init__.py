"""What the parts of a run cost beside their limits and beside others: the stages of `jobs/bench.py`, one a module.

A stage is a function `run(options) -> list[Row]`. Every ratio in a row was measured in that run, its two sides in turns.
"""
