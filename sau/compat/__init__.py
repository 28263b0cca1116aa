"""Files that somebody else made, opened without running what is in them; and ours, written for others to open."""
