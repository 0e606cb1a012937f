"""What is used beside training and evaluation: downloads, comparisons, galleries, publishing, prompts, costs."""
