"""Experiments in the embedded tiny world."""
