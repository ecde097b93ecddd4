"""Trajectories: how the network's outputs for every training example change from epoch to epoch.

Imports core alone, and can be used alone. Begin with `kinds`, what is recorded; then `buffer`, where it gathers on the
devices, and `store`, where it lies on disk. `batches` takes what somebody else's training loop hands over.
"""
