"""Defences: from what was recorded to which examples to remove."""
