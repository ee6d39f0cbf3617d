"""Storage on any filesystem, retried; and embeddings in files."""
