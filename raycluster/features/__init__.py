"""The N x D feature matrix: where it lives, and how images become its rows."""
