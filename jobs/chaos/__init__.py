"""Fault injection: small runs on a cluster of local processes that are killed from outside."""
