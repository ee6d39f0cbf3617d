"""K-means: Lloyd iterations with momentum, initialisation, hierarchy."""
