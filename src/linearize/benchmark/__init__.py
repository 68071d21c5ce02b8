"""Measures attention, whole transformers, training steps and sampling against the dense teacher."""
