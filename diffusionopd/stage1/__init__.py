<<<<<<< HEAD
"""Ways of training a LoRA without on-policy distillation: from rewards (stage 1), and from samples of teachers."""

from diffusionopd.stage1.grpo import Grpo
from diffusionopd.stage1.nft import Nft
from diffusionopd.stage1.reinforced import Reinforced, RewardRecipe, Score
from diffusionopd.stage1.sft import Supervised

__all__ = ["Grpo", "Nft", "Reinforced", "RewardRecipe", "Score", "Supervised"]
=======
"""Stage 1 of the method: one teacher per task, trained by reinforcement learning on the task's reward.

`objectives` are the losses of DiffusionNFT, Flow-GRPO and GRPO-Guard, `advantages` turns rewards into what they weigh
samples with. Both are pure functions of tensors.
"""
>>>>>>> main
