"""Whatever owns a folder: experiments, scans, sweeps, scorings of stored trajectories, recorders of own loops.

May import everything but `cli` and `benchmarks`. Begin with `experiment`, the story of a run: `phases` and `defending`
have its parts, `trainer` what its trainings share, `artefacts` where the costly things lie. `scan` is the other story;
`own_loop` has the recorder for loops of other frameworks. `plan` says what a run would take of a machine: `images` how
much there is to do, `programs` what runs, `compiling` what that takes.
"""
