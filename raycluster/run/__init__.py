"""One run: its loop, its state, its directory."""
