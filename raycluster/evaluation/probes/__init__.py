"""Probes that learn from frozen features and labels: one file each."""
