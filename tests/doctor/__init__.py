"""Tests of the doctor, `show` and the memory estimate."""
