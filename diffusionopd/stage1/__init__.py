"""Stage 1 of the method: one teacher per task, trained by reinforcement learning on the task's reward.

`objectives` are the losses of DiffusionNFT, Flow-GRPO and GRPO-Guard, `advantages` turns rewards into what they weigh
samples with. Both are pure functions of tensors.
"""
