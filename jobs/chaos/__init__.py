"""Fault injection: small runs on a local Ray cluster whose processes are killed from outside."""
