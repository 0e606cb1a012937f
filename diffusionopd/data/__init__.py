"""Prompts, their order, the noise of every sample, and batches."""
