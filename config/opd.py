"""Distillation on Stable Diffusion 3.5 Medium at 512x512, the published setup, and on its siblings.

``mopd`` distils three teachers (aesthetics, text rendering, composition) into one student; ``sopd_*`` one teacher each.
The teachers are the released LoRAs. The prompt files go to ``dataset/`` (see ``dataset/README.md``).

``mopd_24gb``, ``mopd_40gb`` and ``mopd_80gb`` are the rounds of ``mopd`` on one GPU of that memory.
``sd3_medium_mopd`` and ``sd35_large_mopd`` do the same on the family's other sizes, for which no teachers are released:
``config/teacher.py`` trains them with ``--config.pretrained.model=...``.
"""

from ml_collections import ConfigDict

from diffusionopd.training import base_config as _defaults

# guidance_scale is the one that a teacher was trained with: GenEval's was trained without classifier-free guidance.
PICKSCORE = {
    "name": "pickscore",
    "dataset": "dataset/pickscore",
    "lora_path": "quanhaol/DiffusionOPD/AesTeacher/lora",
    "proxy_reward": {"pickscore": 1.0},
    "prompt_fn": "general_ocr",
    "guidance_scale": 4.5,
}
OCR = {
    "name": "ocr",
    "dataset": "dataset/ocr",
    "lora_path": "quanhaol/DiffusionOPD/OCRTeacher/lora",
    "proxy_reward": {"ocr": 1.0},
    "prompt_fn": "general_ocr",
    "guidance_scale": 4.5,
}
GENEVAL = {
    "name": "geneval",
    "dataset": "dataset/geneval",
    "lora_path": "quanhaol/DiffusionOPD/GenEvalTeacher/lora",
    "proxy_reward": {"geneval": 1.0},
    "prompt_fn": "geneval",
    "guidance_scale": 1.0,
}


def get_config(name: str) -> ConfigDict:
    """Return the one called ``name``: mopd, mopd_{24gb,40gb,80gb,fold,beyond,merged}, sopd_{pickscore,ocr,geneval},
    sd3_medium_mopd, sd35_large_mopd."""
    return globals()[name]()


def mopd() -> ConfigDict:
    """Three teachers, one student.

    Command:   bash scripts/single_node/mopd.sh
    Hardware:  8 GPUs; 72 images per round, 24 per task; at the peak 21, 30 or 40 GB each with 1, 2 or 3 tasks in
               a pass and the rewards' models (computed, python -m tools.cost)
    Cost:      11.26 hours (published), after the teachers' 85.75, 33.17 and 46.92 hours
    Expected:  GenEval 0.96, OCR 0.94, PickScore 23.99, ClipScore 0.297, HPSv2.1 0.342, Aesthetic 6.15,
               ImageReward 1.50, UnifiedReward 3.50 (published, Table 1 of arXiv 2605.15055; base model with guidance:
               0.63, 0.59, 22.34, 0.285, 0.279, 5.36, 0.85, 3.03)
    """
    return _distillation("mopd", [PICKSCORE, OCR, GENEVAL])


def mopd_24gb() -> ConfigDict:
    """``mopd`` on one GPU of 24 GB, where the rewards' models wait on the CPU.

    Command:   CONFIG=config/opd.py:mopd_24gb NUM_PROCESSES=1 bash scripts/single_node/mopd.sh
    Hardware:  1 GPU, 19 GB at the peak, 4 images in a pass; 72 images per round, 24 per task
    Cost:      8.8 PFLOP per round (computed, as the memory, by python -m tools.cost), 24 s on an H100 with 9 images
               in a pass (measured with random weights)
    Expected:  the student of ``mopd``; not run
    """
    config = _one_process("mopd_24gb", batch=4)
    config.reward_options = {reward: {"device": "cpu"} for reward in ("pickscore", "geneval")}
    return config


def mopd_40gb() -> ConfigDict:
    """``mopd`` on one GPU of 40 GB.

    Command:   CONFIG=config/opd.py:mopd_40gb NUM_PROCESSES=1 bash scripts/single_node/mopd.sh
    Hardware:  1 GPU, 31 GB at the peak with the rewards' models, 6 images in a pass; 72 images per round, 24 per task
    Cost:      as ``mopd_24gb``
    Expected:  as ``mopd_24gb``
    """
    return _one_process("mopd_40gb", batch=6)


def mopd_80gb() -> ConfigDict:
    """``mopd`` on one GPU of 80 GB.

    Command:   CONFIG=config/opd.py:mopd_80gb NUM_PROCESSES=1 bash scripts/single_node/mopd.sh
    Hardware:  1 GPU, 67 GB at the peak with the rewards' models, 18 images in a pass; 72 images per round, 24 per task
    Cost:      as ``mopd_24gb``
    Expected:  as ``mopd_24gb``
    """
    return _one_process("mopd_80gb", batch=6)


def mopd_fold() -> ConfigDict:
    """Guidance folded into the student: without guidance itself, it learns what each teacher draws under its own.

    Half the student's forwards, in training and afterwards. Evaluate and use it at guidance 1 first (``eval.sh
    --guidance_scale 1.0``); a guidance near 2 on top has been reported as better (arXiv 2609.39692).

    Command:   CONFIG=config/opd.py:mopd_fold bash scripts/single_node/mopd.sh
    Hardware:  8 GPUs; 72 images per round, 24 per task
    Cost:      student NFE half of ``mopd``'s
    Expected:  not measured here. Published for Large to Medium at 1024x1024: GenEval .952 against .884 unfolded
    """
    return _folded("mopd_fold")


def mopd_beyond() -> ConfigDict:
    """``mopd_fold``, with targets beyond the teachers: 1.25 times the way from the base to each.

    Command:   CONFIG=config/opd.py:mopd_beyond bash scripts/single_node/mopd.sh
    Hardware:  8 GPUs; 72 images per round, 24 per task
    Cost:      one more forward of the base, without gradient, for each of a teacher's
    Expected:  not measured here. Published for Large to Medium at 1024x1024: GenEval .963 against .952 at strength 1
    """
    return _folded("mopd_beyond", strength=1.25)


def mopd_merged() -> ConfigDict:
    """``mopd`` from the sum of its teachers (task arithmetic), which the distillation repairs.

    Command:   CONFIG=config/opd.py:mopd_merged bash scripts/single_node/mopd.sh
    Hardware:  8 GPUs; 72 images per round, 24 per task
    Cost:      not measured here
    Expected:  not measured here; in the tiny world see the arms "start" of experiments/claims
    """
    config = _distillation("mopd_merged", [PICKSCORE, OCR, GENEVAL])
    config.train.student_init = "teachers"
    return config


def sopd_pickscore() -> ConfigDict:
    """The aesthetics teacher alone.

    Command:   CONFIG=config/opd.py:sopd_pickscore bash scripts/single_node/sopd.sh
    Hardware:  8 GPUs; 72 images per round
    Cost:      not published for a single teacher
    Expected:  towards the teacher: PickScore 24.02, ClipScore 0.295, HPSv2.1 0.346, Aesthetic 6.22,
               ImageReward 1.498, UnifiedReward 3.48 (the teacher's own scores, published)
    """
    return _distillation("sopd_pickscore", [PICKSCORE])


def sopd_ocr() -> ConfigDict:
    """The text rendering teacher alone.

    Command:   CONFIG=config/opd.py:sopd_ocr bash scripts/single_node/sopd.sh
    Hardware:  8 GPUs; 72 images per round
    Cost:      not published for a single teacher
    Expected:  towards the teacher: OCR 0.93 (the teacher's own score, published)
    """
    return _distillation("sopd_ocr", [OCR])


def sopd_geneval() -> ConfigDict:
    """The composition teacher alone.

    Command:   CONFIG=config/opd.py:sopd_geneval bash scripts/single_node/sopd.sh
    Hardware:  8 GPUs; 72 images per round
    Cost:      not published for a single teacher
    Expected:  towards the teacher: GenEval 0.96 (the teacher's own score, published)
    """
    return _distillation("sopd_geneval", [GENEVAL])


def sd3_medium_mopd() -> ConfigDict:
    """Three teachers, one student, on Stable Diffusion 3 Medium (24 blocks, 2.0 B parameters, no QK norm).

    Command:   CONFIG=config/opd.py:sd3_medium_mopd bash scripts/single_node/mopd.sh
               '--config.train.teachers[0].lora_path=...' and [1] (ocr), [2] (geneval): teachers of this base
    Hardware:  8 GPUs, 18 GB each at the peak with the rewards' models, a task in a pass; 72 images per round, 24 per
               task
    Cost:      7.5 PFLOP per round, 2.5 s on 8 H100 at 47% of 790 TFLOP/s (computed, python -m tools.cost)
    Expected:  not published and not measured; a student is compared with its own teachers
    """
    return _sibling("sd3_medium_mopd", "stabilityai/stable-diffusion-3-medium-diffusers")


def sd35_large_mopd() -> ConfigDict:
    """Three teachers, one student, on Stable Diffusion 3.5 Large (38 blocks, 8.1 B parameters), in bf16 as published.

    Command:   CONFIG=config/opd.py:sd35_large_mopd bash scripts/single_node/mopd.sh
               '--config.train.teachers[0].lora_path=...' and [1] (ocr), [2] (geneval): teachers of this base
    Hardware:  8 GPUs, 44 GB each at the peak with the rewards' models, a task in a pass (26 GB with
               --config.activation_checkpointing=True); 72 images per round, 24 per task
    Cost:      28 PFLOP per round, 9.3 s on 8 H100 at 47% of 790 TFLOP/s (computed, python -m tools.cost)
    Expected:  not published and not measured; a student is compared with its own teachers
    """
    config = _sibling("sd35_large_mopd", "stabilityai/stable-diffusion-3.5-large")
    config.mixed_precision = "bf16"
    return config


def _one_process(run_name: str, batch: int) -> ConfigDict:
    """The published rounds in one process: the same images in an optimizer step, and the same moving average."""
    config = _distillation(run_name, [PICKSCORE, OCR, GENEVAL])
    config.sample.train_batch_size = config.train.batch_size = batch
    config.sample.num_batches_per_epoch = config.train.gradient_accumulation_steps = 72 // batch
    config.train.ema_repeats = 3  # as with the published three batches of a process
    return config


def _folded(run_name: str, **fields: float) -> ConfigDict:
    """A student without guidance under teachers with theirs."""
    config = _distillation(run_name, [teacher | fields for teacher in (PICKSCORE, OCR, GENEVAL)])
    config.train.cfg = False
    config.sample.eval_guidance_scale = 1.0
    return config


def _sibling(run_name: str, model: str) -> ConfigDict:
    """The published setup on another base, without its teachers."""
    config = _distillation(run_name, [teacher | {"lora_path": ""} for teacher in (PICKSCORE, OCR, GENEVAL)])
    config.pretrained.model = model
    return config


def _distillation(run_name: str, teachers: list[dict]) -> ConfigDict:
    config = _defaults()
    config.run_name = run_name
    config.save_freq = 30
    config.eval_freq = 30
    config.eval_num_prompts = 64  # a curve; all 5,278 would cost 3.6 times the rounds between
    config.resolution = 512
    config.pretrained.model = "stabilityai/stable-diffusion-3.5-medium"

    config.sample.num_steps = 10
    config.sample.train_batch_size = 3
    config.sample.test_batch_size = 16
    config.sample.num_batches_per_epoch = 3
    config.sample.noise_level = 0.0

    config.train.teachers = [dict(teacher) for teacher in teachers]
    config.train.batch_size = 3
    config.train.gradient_accumulation_steps = 3
    config.train.timestep_fraction = 0.99  # the first 9 of 10 steps
    config.train.ema = True
    return config
