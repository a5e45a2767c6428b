"""Readers of records: one file for each format of records, each giving the same records."""
