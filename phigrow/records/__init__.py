"""Records of a run: ``records.jsonl``, written and read."""
