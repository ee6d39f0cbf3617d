"""Features stored in a pool of Ray actors."""
