"""The output of a run: console, metrics.jsonl, trackers, summary, plots."""
