"""Tests of the project as a whole: style, docs, help, launch script."""
