"""What a user asks: flags, YAML files, and what every command is asked."""
