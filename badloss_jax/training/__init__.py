"""The one trainer: data on the devices, state, jitted steps, loop, recorder, checkpoints, saved models.

Imports core, models, data, attacks and trajectories. Begin with `loop`, which tells the whole story, then read `step`,
which is what it repeats. Data come from `resident` or `streamed`, which give the same batches; `passes` looks and does
not train.
"""
