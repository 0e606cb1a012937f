"""Ways of training a LoRA without on-policy distillation: from rewards (stage 1), and from samples of teachers."""

from diffusionopd.stage1.grpo import Grpo
from diffusionopd.stage1.nft import Nft
from diffusionopd.stage1.reinforced import Reinforced, RewardRecipe, Score
from diffusionopd.stage1.sft import Supervised

__all__ = ["Grpo", "Nft", "Reinforced", "RewardRecipe", "Score", "Supervised"]
