"""Published rows, rows measured over seeds, statistics, ranking; no tensors, no torch."""
