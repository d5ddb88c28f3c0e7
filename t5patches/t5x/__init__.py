"""What only T5X needs: models, trainer, feature converters, gin files."""
