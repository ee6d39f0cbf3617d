"""Pre-training on Ray Train, with an elastic group of workers."""
