"""Result folders as tables and as one HTML page: read, take means over seeds, compare with what is published, draw."""
