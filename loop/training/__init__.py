"""The parts of a training step: loss, optimizer, evaluation, samples, micro-batch size."""
