"""Active learning: the rows of a pool whose labels would help a task most. See docs/suggesting.md for the idea."""
