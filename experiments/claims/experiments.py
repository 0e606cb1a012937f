"""The names of the comparisons' experiments and tasks, in the order in which they are run and shown."""

TASKS = ("compose", "ocr", "scene")
TEACHERS = tuple(f"teacher_{task}" for task in TASKS)
BASELINES = ("multitask_nft", "multitask_guard", "cascade_nft")
LABELS = {
    "base": "base",
    **{f"shipped_{task}": f"shipped teacher, {task}" for task in TASKS},
    **{f"teacher_{task}": f"NFT teacher, {task}" for task in TASKS},
    "guard_scene": "GRPO-Guard teacher, scene",
    "multitask_nft": "multi-task NFT",
    "multitask_guard": "multi-task GRPO-Guard",
    "cascade_nft": "cascade NFT",
    "sft": "SFT on teacher samples",
    "opd": "DiffusionOPD",
    "opd_noise00": "DiffusionOPD, paper's loss, ODE",
    "opd_noise03": "DiffusionOPD, paper's loss, noise 0.3",
    "opd_noise07": "DiffusionOPD, paper's loss, noise 0.7",
    "ppo_noise03": "PPO-style OPD, noise 0.3",
    "ppo_noise07": "PPO-style OPD, noise 0.7",
    "multitask_nft_2e3": "multi-task NFT, rate 2e-3",
    "multitask_guard_1e3": "multi-task GRPO-Guard, rate 1e-3",
    "cascade_nft_2e3": "cascade NFT, rate 2e-3",
    "opd_5e4": "DiffusionOPD, rate 5e-4",
    "opd_2e3": "DiffusionOPD, rate 2e-3",
}
DISTILLED = tuple(name for name in LABELS if name.startswith(("sft", "opd", "ppo")))
RATES = {
    "multitask_nft": {"1e-3": "multitask_nft", "2e-3": "multitask_nft_2e3"},
    "multitask_guard": {"5e-4": "multitask_guard", "1e-3": "multitask_guard_1e3"},
    "cascade_nft": {"1e-3": "cascade_nft", "2e-3": "cascade_nft_2e3"},
    "opd": {"5e-4": "opd_5e4", "1e-3": "opd", "2e-3": "opd_2e3"},
}
"""Method -> learning rate -> the experiment that has it."""
