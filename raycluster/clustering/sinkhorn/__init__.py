"""Balanced labels by optimal transport (Sinkhorn-Knopp)."""
