"""Images in: which there are, how they are decoded and varied, and in which order an epoch visits them."""
