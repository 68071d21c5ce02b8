"""Prompts, samples that a teacher generates from them, and the store they are kept in and trained from."""
