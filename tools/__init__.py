"""What is used beside training and evaluation: downloads, comparisons, reports, prompt generators, costs."""
