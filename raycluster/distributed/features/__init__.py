"""Features in a pool of Ray actors."""
