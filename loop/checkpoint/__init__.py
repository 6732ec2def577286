"""What a run leaves on disk: checkpoints, resume, the output folder, full models."""
