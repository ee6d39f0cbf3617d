"""Labels train the network: one optimiser step as a fold over microbatches, the optimisers and their schedule."""
