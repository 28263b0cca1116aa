"""The result folder of a run: its files, their checks, and the lock on it."""
