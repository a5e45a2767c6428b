"""Expansion: from a source checkpoint and a plan to a grown checkpoint, with its certificate."""
