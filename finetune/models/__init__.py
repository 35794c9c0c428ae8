"""Where base models come from, and what is built on them."""
