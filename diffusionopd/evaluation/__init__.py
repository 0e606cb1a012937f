"""Images of test prompts by the ODE, their scores, and the files that hold them."""
