"""Tasks with options: files, templates, splits, batches, scores."""
