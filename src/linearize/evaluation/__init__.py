"""Metrics, summaries, tables and pictures that say how close a student is to its teacher."""
