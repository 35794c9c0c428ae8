"""What people use, built on artifacts."""
