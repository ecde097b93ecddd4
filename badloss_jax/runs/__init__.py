"""Whatever owns a folder: experiments, scans, sweeps, scorings of stored trajectories, recorders of own loops.

May import everything but `cli` and `benchmarks`. Begin with `experiment`, the story of a run; `phases` has its parts.
"""
