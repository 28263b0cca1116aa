"""Reports: read result folders, average over seeds, compare defenses, write tables and an HTML page."""
