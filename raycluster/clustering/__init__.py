"""Clustering as folds over features: sums of small integers, so no result depends on how rows are dealt out."""
