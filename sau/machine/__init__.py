"""What a run is given to run on: devices, threads, precision, memory, processes."""
