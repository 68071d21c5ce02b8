"""Pure functions on query, key and value: they know tensors and grids, and nothing of models."""
