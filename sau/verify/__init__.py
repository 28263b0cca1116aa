"""Whether a result folder says the truth."""
