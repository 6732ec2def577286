"""Tests of data/preparation: `python -m data`."""
