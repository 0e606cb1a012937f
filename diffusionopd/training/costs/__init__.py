"""What a run costs, counted on its real models without their weights; `tools.cost` prints it."""
