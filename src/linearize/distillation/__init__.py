"""Distillation: the Lightning module, its losses and stages, checkpoints and callbacks."""
