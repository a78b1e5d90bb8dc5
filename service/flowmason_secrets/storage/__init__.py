"""What holds secrets and events."""
