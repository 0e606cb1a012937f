"""Generators of prompt files: `python -m tools.prompts geneval|ocr`."""
