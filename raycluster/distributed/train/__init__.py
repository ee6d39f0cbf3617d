"""Ray Train: the elastic group of training workers."""
