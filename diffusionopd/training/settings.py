"""The keys of the run itself: its folder, saving, resuming, monitoring and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffusionopd.config_schema import FREE, READ, REWARDS, WRITE, Problems, is_number, key, unset
from diffusionopd.config_schema.paths import check_writable
from diffusionopd.data.tasks import is_name
from diffusionopd.files import looked_in
from diffusionopd.training.checkpoint import CheckpointError, locate
from diffusionopd.training.trackers import TRACKERS


@dataclass(frozen=True)
class RunSettings:
    """The run."""

    run_name: str = key("run_name", "", resume=FREE)
    """Name of the run: its folder under `logdir`, and its name in the tracker. Empty: the configuration's name."""
    logdir: str = key("logdir", "logs", path=WRITE, resume=FREE)
    """Folder that holds the folders of runs."""
    save_dir: str = key("save_dir", "", path=WRITE, resume=FREE)
    """The run folder itself. Empty: `<logdir>/<run_name>`."""
    num_epochs: int = key("num_epochs", 100000, "[1, inf)", resume=FREE)
    """Rounds to train, in total: a resumed run counts those already done."""
    save_freq: int = key("save_freq", 20, "[0, inf)", resume=FREE)
    """Rounds between checkpoints; 0 saves at the end only. A checkpoint is always saved at the end."""
    num_checkpoint_limit: int = key("num_checkpoint_limit", 5, "[0, inf)", resume=FREE)
    """How many checkpoints to keep, the newest; 0 keeps all."""
    resume_from: str = key("resume_from", None, path=READ, resume=FREE)
    """Where to start from: None or "" afresh, the path of a checkpoint folder or of a run (its latest checkpoint), or
    "auto": the newest checkpoint of the run folder, afresh if there is none."""
    log_with: str = key("log_with", "none", resume=FREE)
    """Trackers besides metrics.jsonl: "none", "tensorboard", "wandb", "swanlab", "mlflow", or several with commas. They
    get the numbers of each round, sample grids (`sample_freq`) and a table of each evaluation (`eval_freq`)."""
    log_images: bool = key("log_images", True, resume=FREE)
    """Whether trackers are shown the sample grids, which have prompts below the images."""
    run_project: str = key("run_project", "diffusionopd", resume=FREE)
    """Project name in the tracker."""
    collective_timeout: float = key("collective_timeout", 1800.0, "(0, inf)", resume=FREE)
    """Seconds that a process waits for the others at a barrier before it ends with an error that names the missing
    ones. Encoding prompts for the first time, and evaluations, may take 12 hours whatever this says."""

    @property
    def run_dir(self) -> Path:
        """``save_dir`` where it is set, else ``<logdir>/<run_name>``; absolute."""
        parts = (self.logdir or "", self.run_name or "") if unset(self.save_dir) else (self.save_dir,)
        return Path(*parts).absolute()

    @property
    def trackers(self) -> list[str]:
        """The names in ``log_with``."""
        return tracker_names(self.log_with)

    def check(self, problems: Problems) -> None:
        """The folder can be written, what is resumed from is there, trackers are installed."""
        if unset(self.save_dir) and (unset(self.run_name) or unset(self.logdir)):
            problems.add("run_name", "is empty", "Set run_name (and logdir), or save_dir.")
        else:
            check_writable("logdir" if unset(self.save_dir) else "save_dir", self.run_dir, problems)
        if not unset(self.resume_from) and self.resume_from != "auto":
            remedy = 'Name a checkpoint-<n> folder, or use "auto".'
            try:
                folder = locate(self.resume_from)
            except CheckpointError as error:
                problems.add("resume_from", f"is {self.resume_from}: {error}", remedy)
            else:
                if not (folder / "state").is_dir():
                    there = "has no state/ to resume from"
                    what = there if folder.is_dir() else f"does not exist{looked_in(folder)}"
                    problems.add("resume_from", f"is {folder}, which {what}", remedy)
        if unknown := [name for name in self.trackers if name not in TRACKERS]:
            remedy = f'Use "none", or some of {", ".join(TRACKERS)} with commas.'
            problems.add("log_with", f"names {', '.join(map(repr, unknown))}", remedy)
        elif missing := [name for name in self.trackers if find_spec(name) is None]:
            problems.add("log_with", f"needs {', '.join(missing)}", f"pip install -e '.[{','.join(missing)}]'")


def tracker_names(log_with: str | None) -> list[str]:
    """The names in the key ``log_with``; "none", in any case, is none."""
    return [name for part in str(log_with or "").split(",") if not unset(name := part.strip())]


_VARIANTS = '{name: {"guidance_scale": at least 1, "num_steps": at least 1}}, a name of letters, digits, "-", "_"'


def _are_variants(value: Mapping[Any, Any]) -> bool:
    fields = {
        "guidance_scale": lambda x: is_number(x) and x >= 1,
        "num_steps": lambda x: type(x) is int and x >= 1,
    }
    return all(
        is_name(name) and isinstance(own, Mapping) and own and all(f in fields and fields[f](x) for f, x in own.items())
        for name, own in value.items()
    )


@dataclass(frozen=True)
class WatchSettings:
    """Monitoring and evaluation."""

    monitor_freq: int = key("monitor_freq", 10, "[0, inf)", resume=FREE)
    """Rounds between scorings of a round's own images with each task's `proxy_reward`; 0 is never. The first round and
    the last are scored too. Scores are logged, not trained on; training from rewards logs every round's. With
    `train.task_order` "alternate" a round of each task, in a row, is scored."""
    sample_freq: int = key("sample_freq", 10, "[0, inf)", resume=FREE)
    """Rounds between grids of sample images in `<run folder>/samples`; 0 is never; the first, the last and "alternate"
    as above."""
    eval_freq: int = key("eval_freq", 20, "[0, inf)", resume=FREE)
    """Rounds between evaluations on the test prompts of every task, with the EMA student; 0 is never. The first is
    before round 1, of what the student starts as."""
    eval_num_prompts: int = key("eval_num_prompts", 0, "[0, inf)", resume=FREE)
    """Test prompts per task (all processes together), and folder of it, in such an evaluation; 0 is all."""
    eval_num_steps: int = key("sample.eval_num_steps", 40, "[1, inf)", resume=FREE, from_model="num_steps")
    """Sampler steps in evaluation: of the first-order ODE, of the second-order one where the base's pipeline is."""
    eval_guidance_scale: float = key(
        "sample.eval_guidance_scale", 4.5, "[1, inf)", resume=FREE, from_model="guidance_scale"
    )
    """Classifier-free guidance in evaluation; 1.0 is without."""
    eval_variants: dict = key("eval_variants", {}, form=(_VARIANTS, _are_variants), resume=FREE)
    """Evaluations to make beside each: {name: {"guidance_scale": ..., "num_steps": ...}}, of which one may be left out
    to be the task's. Such as {"unguided": {"guidance_scale": 1.0}}, logged as `eval/<task>@unguided/<reward>`."""
    test_batch_size: int = key("sample.test_batch_size", 1, "[1, inf)", resume=FREE)
    """Images per process in a batch of the evaluation."""
    reward_options: dict = key(
        "reward_options",
        {},
        form=(
            "{reward: {option: value}}",
            lambda value: isinstance(value, Mapping) and all(isinstance(v, Mapping) for v in value.values()),
        ),
        resume=REWARDS,
    )
    """What scorers are built with: {reward: {option: value}}, such as {"unifiedreward": {"base_url": "http://..."}};
    docs/rewards.md has every scorer's options. "device" and "dtype" are among them where a scorer has a model."""
    reward_timeout: float = key("reward_timeout", 600.0, "(0, inf)", resume=FREE)
    """Seconds that a reward may take for one batch, waiting for its server included. Rewards that are trained on end
    the run after that (with several processes it must be below `collective_timeout`); in monitoring and evaluation
    the run goes on without them."""
