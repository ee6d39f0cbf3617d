"""Clustering as folds over features: sums of small integers, bitwise identical for any partition of the rows."""
