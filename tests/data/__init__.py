"""Tests of loop-independent data code: files, dialogues, encoding, batching."""
