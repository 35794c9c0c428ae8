"""A finished run as a folder that another engine runs, and the proof that it still gives the same answers."""
