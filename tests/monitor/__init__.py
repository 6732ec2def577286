"""Tests of loop/monitor: log, trackers, plots, summary."""
