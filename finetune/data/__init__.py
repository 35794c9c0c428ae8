"""Data sets: cards, rows, splits, checks, batches."""
