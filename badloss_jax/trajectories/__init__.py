"""Trajectories: what is recorded, the sharded buffer on the devices, the store on disk."""
