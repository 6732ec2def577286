"""The files of a run: checkpoints, resume, the output folder, full models."""
