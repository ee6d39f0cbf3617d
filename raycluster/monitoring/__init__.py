"""Monitoring of a run: status, console, TensorBoard."""
