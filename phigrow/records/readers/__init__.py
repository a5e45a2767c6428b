"""Readers of records: one module for each file format. All return the same records."""
