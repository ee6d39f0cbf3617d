"""Evaluations of features and labels against the truth: each module offers ``evaluate(...) -> dict[str, float]``."""
