"""What a run reports: console, metrics.jsonl, trackers, summary, plots."""
