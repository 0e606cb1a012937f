"""What is published of a trained student: its files, a model card made of what the run and its evaluations hold."""
