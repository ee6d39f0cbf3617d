"""Nearest centroids: fast proposals with proven error bounds, decided exactly."""
