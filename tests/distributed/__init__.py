"""Tests of loop/distributed: launches, backends, optimizer state, output, stops."""
