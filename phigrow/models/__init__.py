"""Architectures: configurations, the table of every family, sizes, costs and memory."""
