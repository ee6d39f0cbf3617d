"""Hyperparameter sweeps without Ray: search spaces, proposals, early stopping, ranking and the report page."""
