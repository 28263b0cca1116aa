"""What a run computes on: device, threads, precision, CUDA graphs, micro-batches, fast batch norm."""
