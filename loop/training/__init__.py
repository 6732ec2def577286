"""One step: loss, optimizer, evaluation, samples, micro-batch size."""
