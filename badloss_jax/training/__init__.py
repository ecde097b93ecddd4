"""The one trainer: mesh and shardings, resident data, state, jitted steps, loop, saved models."""
