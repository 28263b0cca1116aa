"""What the scripts do: the order of calls of an attack and a defense, and what they keep of a run."""
