"""From a file of unwanted outputs to an edited model, with no T5X."""
