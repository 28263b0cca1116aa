"""The result folder: every file that a run leaves, and how it is told that they are as they were left."""
