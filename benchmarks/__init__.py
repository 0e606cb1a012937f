"""Dated measurements as ratios side by side, and what they need; see README.md here."""
