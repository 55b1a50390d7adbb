"""The network: encoders, trunk, heads, as NNX modules that own parameters and pure functions that use them."""
