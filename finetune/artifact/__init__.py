"""What a run leaves: its folder, the model to load, the card."""
