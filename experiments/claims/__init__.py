"""The claims of the paper, measured in the tiny world."""
