"""The losses, written once: row statistics and one line per objective."""
