"""A comparison as one file: attacks x defenses x seeds x ratios, run cell by cell on this machine or on Ray."""
