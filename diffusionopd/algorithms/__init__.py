"""Ways of training a LoRA without on-policy distillation: from rewards (stage 1), and from samples of teachers."""

from diffusionopd.algorithms.grpo import Grpo
from diffusionopd.algorithms.nft import Nft
from diffusionopd.algorithms.reinforced import Reinforced, RewardRecipe, Score
from diffusionopd.algorithms.sft import Supervised

__all__ = ["Grpo", "Nft", "Reinforced", "RewardRecipe", "Score", "Supervised"]
