"""The machines as a run sees them."""
