"""Files that appear whole, claims on directories, fingerprints: imports nothing of ours."""
