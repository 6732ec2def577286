"""Tests of chat, merge and export."""
