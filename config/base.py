"""Every configuration key, its default, and what it does.

The other files here start from these defaults and set what differs. Any key can be set on the command line too:
``--config config/opd.py:mopd --config.train.learning_rate=1e-4 --config.train.teachers[0].guidance_scale=1.0``.

Words: a *round* (upstream: epoch) visits every task once and ends in one optimizer step. A *batch* is what one process
generates at a time. "Per process" is per GPU. Names and defaults are those of the upstream release where it has them.
Keys marked [no effect] are accepted because existing files set them; distillation does not use them.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return a fresh copy of the defaults. Not runnable by itself: it names no model and no teachers."""
    # Types are checked all at once, before any weight is loaded (diffusionopd/config_schema.py), not on assignment.
    config = ConfigDict(type_safe=False)

    # ---- The run -----------------------------------------------------------------------------------------------------
    # Name of the run: its folder under logdir, and its name in the tracker. Empty: the name of the configuration.
    config.run_name = ""
    # Folder that holds the folders of runs.
    config.logdir = "logs"
    # The run folder itself. Empty: <logdir>/<run_name>.
    config.save_dir = ""
    # Seed of everything random: adapter initialisation, prompt order, initial and step noise.
    config.seed = 42
    # Rounds to train, in total: a resumed run counts those already done.
    config.num_epochs = 100000
    # Rounds between checkpoints; 0 saves at the end only. A checkpoint is always saved at the end.
    config.save_freq = 20
    # How many checkpoints to keep, the newest; 0 keeps all.
    config.num_checkpoint_limit = 5
    # Where to start from: None or "" afresh, the path of a checkpoint folder, or "auto": the newest checkpoint of the
    # run folder, afresh if there is none.
    config.resume_from = None
    # Rounds between evaluations on the test prompts of every task, with the EMA student; 0 is never.
    config.eval_freq = 20
    # Test prompts per task (all processes together) in such an evaluation; 0 is all.
    config.eval_num_prompts = 0
    # Rounds between scorings of a round's own pictures with each task's proxy_reward; 0 is never. Scores are logged,
    # not trained on.
    config.monitor_freq = 10
    # What scorers are built with: {reward: {option: value}}, such as {"unifiedreward": {"base_url": "http://..."}};
    # docs/rewards.md has every scorer's options. "device" and "dtype" are among them where a scorer has a model.
    config.reward_options = {}
    # Seconds that a reward may take for one batch, waiting for its server included. Rewards that are trained on end the
    # run after that (with several processes it must be below collective_timeout); in monitoring and evaluation the run
    # goes on without them.
    config.reward_timeout = 600.0
    # Rounds between grids of sample pictures in <run folder>/samples; 0 is never.
    config.sample_freq = 10
    # Trackers besides metrics.jsonl: "none", "tensorboard", "wandb" or "wandb,tensorboard".
    config.log_with = "none"
    # Project name in the tracker.
    config.run_project = "diffusionopd"
    # Seconds that a process waits for the others, at each point where they meet, before it ends with an error that
    # names the missing ones. Encoding prompts for the first time may take hours whatever this says.
    config.collective_timeout = 1800.0

    # ---- Precision and memory ----------------------------------------------------------------------------------------
    # "no", "fp16" or "bf16": the type in which frozen weights are held and the transformer computes. LoRA weights, the
    # optimizer and the loss are float32 in each case. On a CPU "no" is by far the fastest.
    config.mixed_precision = "fp16"
    # Allow TF32 in float32 matrix products and convolutions on NVIDIA GPUs: faster, 10 bits of mantissa.
    config.allow_tf32 = True
    # Recompute activations in the backward pass: less memory, about a third more time for the student.
    config.activation_checkpointing = False
    # Where text encoders work (they leave memory once every prompt is encoded) and where the VAE stays: "cpu",
    # "cuda:1"; empty is the training device. Every process loads its own.
    config.text_encoder_device = ""
    config.vae_device = ""
    # Kernel of the attention layers: "flash", "efficient", "cudnn" or "math"; "" lets torch choose, which in half
    # precision on a GPU is flash or cudnn already.
    config.attention_backend = ""
    # Compile the transformer's blocks (torch.compile): minutes at the start, faster rounds on a GPU; needs a compiler.
    config.compile = False
    # Make the batches of the next round (prompts, cached embeddings, noise) in a thread while this one trains. They are
    # the same; the embeddings of two rounds are in the host's memory.
    config.prefetch = True
    # Must be True: the student is a LoRA on the frozen base.
    config.use_lora = True

    # ---- Pictures and text -------------------------------------------------------------------------------------------
    # Height and width in pixels, a multiple of 16.
    config.resolution = 768
    # Length in tokens to which T5 prompts are cut or padded.
    config.max_sequence_length = 128
    # Folder of the prompt embeddings, shared by runs (keyed by model, prompt and length).
    config.cache_dir = ".cache/text"

    # ---- The base model ----------------------------------------------------------------------------------------------
    config.pretrained = pretrained = ConfigDict(type_safe=False)
    # A diffusers pipeline: hub id ("organisation/name") or local folder with model_index.json.
    pretrained.model = ""
    # Branch, tag or commit on the hub; empty is the default branch. Unused for a local folder.
    pretrained.revision = ""

    # ---- Generation --------------------------------------------------------------------------------------------------
    config.sample = sample = ConfigDict(type_safe=False)
    # Denoising steps of a trajectory in training.
    sample.num_steps = 40
    # Denoising steps in evaluation (always a first-order ODE).
    sample.eval_num_steps = 40
    # Classifier-free guidance of the student in training (if train.cfg); 1.0 is without.
    sample.guidance_scale = 4.5
    # Classifier-free guidance in evaluation; 1.0 is without.
    sample.eval_guidance_scale = 4.5
    # Guidance of the teachers that have no guidance_scale of their own; 1.0 is without.
    sample.teacher_guidance_scale = 4.5
    # Pictures per process in a batch.
    sample.train_batch_size = 1
    # Pictures per process in a batch of the evaluation.
    sample.test_batch_size = 1
    # Pictures per prompt in a round. Divides the pictures of a task in a round, over all batches and processes.
    sample.num_image_per_prompt = 1
    # Batches per process and round, shared equally by the tasks: a multiple of the number of teachers.
    sample.num_batches_per_epoch = 2
    # Sampler of the training trajectories: "flow", "dance", "cps" or "ddim", stochastic with the amount of noise_level,
    # or "dpm1", "dpm2", ODE solvers of first and second order without noise.
    sample.solver = "flow"
    # Amount of noise (eta) that a step of flow, dance, cps or ddim adds; at 0 each of them is the Euler ODE.
    # cps and ddim take at most 1.
    sample.noise_level = 0.7
    # True is the same as noise_level 0.
    sample.deterministic = False
    # Start the pictures of one prompt from the same initial noise.
    sample.same_latent = False
    # [no effect] Of reinforcement-learning code: its batch size and SDE window.
    sample.batch_size = 1
    sample.sde_window_size = 0
    sample.sde_window_range = (0, 0)

    # ---- What is trained, and how ------------------------------------------------------------------------------------
    config.train = train = ConfigDict(type_safe=False)
    # How: "opd", on-policy distillation from the teachers; "sft", supervised on the teachers' samples; or, without
    # teachers, from rewards: "nft" (DiffusionNFT), "grpo" (Flow-GRPO), "grpo_guard" (GRPO-Guard).
    train.algorithm = "opd"
    # Which tasks a round visits: "together", all of them; "alternate", one, in turn; "cascade", one, each for an equal
    # share of the rounds, one after another. num_batches_per_epoch is shared by the tasks of a round.
    train.task_order = "together"
    # The tasks: a list of {name, dataset, lora_path, proxy_reward, prompt_fn, guidance_scale, ...}:
    #   name            of the task, in logs and files: letters, digits, "-", "_"
    #   dataset         folder with the prompts: {train,test}.txt or {train,test}_metadata.jsonl
    #   lora_path       the teacher: local folder, .safetensors file, or hub id with subfolder ("organisation/name/sub")
    #                   (without effect when the training is from rewards)
    #   proxy_reward    {reward: weight} to monitor (monitor_freq) and evaluate (eval_freq) with; {} for none. Training
    #                   from rewards maximises their weighted mean
    #   prompt_fn       "general_ocr" reads the .txt files, one prompt a line; "geneval" reads the .jsonl files
    #   guidance_scale  of this teacher; optional (sample.teacher_guidance_scale)
    #   eval_guidance_scale, eval_num_steps
    #                   of the student, in evaluations on this task; optional (sample.eval_*)
    train.teachers = []
    # What is minimised: "kl", the closed-form KL of student and teacher steps (ODE: half the squared distance of their
    # means), or "policy_gradient", the PPO-style surrogate, whose advantage is minus the KL as the sampled next state
    # shows it (needs noise).
    train.loss = "kl"
    # In which quantity "kl" compares: "mean" of the step (the paper's), "velocity", or "x0".
    train.target = "mean"
    # Divide each sample's error by its own mean magnitude (detached).
    train.self_normalize = False
    # "policy_gradient", and "grpo", clip the probability ratio to [1 - clip_range, 1 + clip_range].
    train.clip_range = 1e-4
    # Weight of staying near the base model without adapters (distillation: by the same loss; grpo: by the KL; nft: by
    # the squared distance of the velocities); above 0 it costs one more evaluation a step.
    train.beta = 0.0
    # The loss is multiplied by this before the backward pass, so that the gradient is large against adam_epsilon
    # (measured in docs/method.md); the logged loss and gradient norm, and max_grad_norm, are in units of the loss as
    # it is.
    train.loss_scale = 1e4
    # Train the student under classifier-free guidance, at sample.guidance_scale.
    train.cfg = True
    # Fraction of the steps to train on, from the first: int(num_steps * timestep_fraction) steps.
    train.timestep_fraction = 1.0
    # Distillation: of the trained steps of a rollout, this many are supervised, drawn anew for each round and task, all
    # equally likely; the others cost the student's forward pass only, and those after the last one nothing. The
    # gradient is the same in expectation. 0 supervises all.
    train.steps_per_rollout = 0
    # Give each teacher merged copies of the matrices that it adapts, W + alpha / r B A, instead of its LoRA beside the
    # base: its passes cost no more than the base's, its memory is that of these matrices (docs/performance.md). In half
    # precision the copies are rounded.
    train.merge_teachers = False
    # Pictures per process in one backward pass. Divides sample.train_batch_size.
    train.batch_size = 1
    # Backward batches per optimizer step. num_batches_per_epoch * sample.train_batch_size / train.batch_size makes one
    # step a round; k times that, one every k rounds, which then count as one for EMA and nft's old policy. A divisor
    # of it makes several steps a round, except in a distillation.
    train.gradient_accumulation_steps = 1
    # Passes over one round's trajectories or samples. Distillation above 1 keeps the trajectories in memory.
    train.num_inner_epochs = 1
    # AdamW.
    train.learning_rate = 3e-4
    train.adam_beta1 = 0.9
    train.adam_beta2 = 0.999
    train.adam_weight_decay = 1e-4
    train.adam_epsilon = 1e-8
    # AdamW and the moving average in a few kernels for all tensors together; the same to rounding.
    train.fused_optimizer = True
    # AdamW with 8-bit state (needs bitsandbytes and a GPU).
    train.use_8bit_adam = False
    # Norm to which the gradient of a round is clipped, in units of the loss as it is.
    train.max_grad_norm = 1.0

    # ---- Training from rewards (nft, grpo, grpo_guard) ---------------------------------------------------------------
    # Without train.teachers, the one task: folder of its prompts, their format, and its {reward: weight}.
    config.dataset = ""
    config.prompt_fn = ""
    config.reward_fn = {}
    # Advantages are rewards minus the mean of their prompt's pictures (False: of all the round's pictures of the task),
    # divided by the same pictures' standard deviation, or with sample.global_std by that of all.
    config.per_prompt_stat_tracking = True
    sample.global_std = False
    # Advantages are clipped to [-adv_clip_max, adv_clip_max].
    train.adv_clip_max = 5.0
    # "grpo_guard" clips its normalised ratio to [1 - clip_range_lt, 1 + clip_range_gt].
    train.clip_range_lt = 1e-4
    train.clip_range_gt = 1e-4
    # nft: how far the two implicit policies are from the old one; small is bold.
    train.nft_beta = 1.0
    # nft: after n rounds the sampling policy keeps min(slope * max(n - start, 0), maximum) of itself and takes the rest
    # from the student: (start, slope, maximum).
    train.old_policy_decay = (0, 0.001, 0.5)

    # ---- The student's adapter ---------------------------------------------------------------------------------------
    # LoRA to start the student from (forms as for teachers); None is a fresh one.
    train.lora_path = None
    # Rank and alpha of a fresh one; the adapter's output is scaled by alpha / rank.
    train.lora_rank = 32
    train.lora_alpha = 64
    # Linear layers that get one, by the ends of their names.
    train.lora_target_modules = (
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
    )
    # Average the student's weights over rounds; evaluation and the saved LoRA use the average.
    train.ema = False
    # The average keeps min((1 + n) / (10 + n), ema_decay) of itself, every ema_interval rounds (rounds that share an
    # optimizer step count as one).
    train.ema_decay = 0.9
    train.ema_interval = 8

    # ---- Accepted, without effect ------------------------------------------------------------------------------------
    # [no effect] Tasks carry their own prompts and rewards.
    config.prompt_fn_kwargs = {}
    config.proxy_reward_fn = {}
    # [no effect] The schedule's shift is the base model's own.
    train.timestep_shift = 1.0
    # [no effect] Evaluations are written to the run folder; the optimizer of a LoRA is too small to offload.
    config.save_eval_dir = ""
    config.fsdp_optimizer_offload = False
    config.debug = False

    return config
