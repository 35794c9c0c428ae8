"""The monitor of a stream of texts: what is said per topic, how much of it is negative, and when that changes."""
