"""Checkpoints on disk and on the hub: stored bits, readers, the writer, DeepSpeed's universal format."""
