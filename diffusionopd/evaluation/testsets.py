"""What can be evaluated on: test prompts by name or folder, and the rewards that each is scored with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusionopd.data.prompts import Prompt, PromptError, listed, load_folders
from diffusionopd.data.unfit import unfit_lines
from diffusionopd.files import located, looked_in
from diffusionopd.models.backbone import Defaults
from diffusionopd.rewards import check_name

_QUALITY = ("imagereward", "pickscore", "aesthetic", "unifiedreward", "clipscore", "hpsv2")

BENCHMARKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "geneval": ("dataset/geneval", ("geneval",)),
    "ocr": ("dataset/ocr", ("ocr",)),
    "pickscore": ("dataset/pickscore", _QUALITY),
    "drawbench": ("dataset/drawbench", _QUALITY),
    "geneval2": ("dataset/geneval2", ("geneval2",)),
    "dpgbench": ("dataset/dpgbench", ("dpgbench",)),
    "compbench_color": ("dataset/compbench_color", ("compbench_attribute",)),
    "compbench_shape": ("dataset/compbench_shape", ("compbench_attribute",)),
    "compbench_texture": ("dataset/compbench_texture", ("compbench_attribute",)),
    "compbench_spatial": ("dataset/compbench_spatial", ("compbench_spatial",)),
    "compbench_nonspatial": ("dataset/compbench_nonspatial", ("compbench_nonspatial",)),
    "compbench_complex": ("dataset/compbench_complex", ("compbench_complex",)),
    "wise": ("dataset/wise", ("wise",)),
    "wise_verified": ("dataset/wise_verified", ("wise_verified",)),
    "compose": ("assets/tiny/dataset/compose", ("tiny_compose",)),
    "tiny_ocr": ("assets/tiny/dataset/ocr", ("tiny_ocr",)),
    "scene": ("assets/tiny/dataset/scene", ("tiny_scene",)),
}
"""Name -> folder of its prompt files, from the repository's root, and its rewards; the first four as upstream."""

_PUBLISHED = Defaults(num_steps=40, guidance_scale=4.5, max_sequence_length=128, mixed_precision="fp16")  # upstream's


_WITH_METADATA = ("geneval", "geneval2", "dpgbench", "wise", "wise_verified", "compbench_complex")


class BenchmarkError(ValueError):
    """A benchmark that does not exist, or that nothing is known to score with."""


@dataclass(frozen=True)
class Benchmark:
    """Test prompts, the names of the rewards that score their images, and how these are made."""

    name: str
    prompts: list[Prompt]
    rewards: tuple[str, ...]
    num_steps: int
    guidance_scale: float


def first(*values: Any) -> Any:
    """The first that is not None, if there is one."""
    return next((value for value in values if value is not None), None)


def find_benchmark(
    dataset: str,
    config: Mapping[str, Any] | None = None,
    rewards: Sequence[str] = (),
    limit: int | None = None,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    defaults: Callable[[], Defaults] = lambda: _PUBLISHED,
    without: Sequence[str] = (),
) -> Benchmark:
    """The test prompts of a benchmark, the rewards to score it with, and how its images are made.

    Args:
        dataset: name of a task of the configuration, else one of `BENCHMARKS`, else a folder with test prompts.
        config: nested dicts. A task may have `eval_num_steps` and `eval_guidance_scale` of its own, which go before
            those of the section `sample`.
        rewards, num_steps, guidance_scale: in place of the benchmark's own.
        limit: use the first prompts only.
        options: of rewards, by name.
        defaults: gives the base model's own steps and guidance; called at last, for what is left open.
        without: rewards that are left out.

    Raises:
        BenchmarkError: an unknown name, or no reward to score with.
        RewardError: an unknown reward.
        PromptError: the prompt file is missing or malformed, or has prompts that the rewards cannot score.
    """
    config = config or {}
    tasks, sample = config.get("train", {}).get("teachers", []), config.get("sample", {})
    task: Mapping[str, Any] = next((task for task in tasks if task["name"] == dataset), {})
    has = {"dataset": task.get("dataset") or task.get("datasets"), "prompt_fn": task.get("prompt_fn")}
    if task and (missing := [name for name, value in has.items() if not value]):
        raise BenchmarkError(f"task '{dataset}' of the configuration has no {' and no '.join(missing)}")
    named = task.get("datasets") or [task.get("dataset") or BENCHMARKS.get(dataset, (dataset, ()))[0]]
    folders = [Path(located(each)) for each in named]
    folder = folders[0]
    if not task and dataset not in BENCHMARKS and not folder.is_dir():
        known = dict.fromkeys([*(task["name"] for task in tasks), *BENCHMARKS])
        where = looked_in(folder)
        raise BenchmarkError(f"dataset '{dataset}' is neither a folder{where} nor one of {', '.join(known)}")
    # A folder that a named benchmark has its prompts in is scored as that is.
    of_folder = (names for where, names in BENCHMARKS.values() if Path(located(where)).resolve() == folder.resolve())
    chosen = tuple(rewards) or next(of_folder, ()) or tuple(task.get("proxy_reward") or ())
    chosen = tuple(name for name in chosen if name not in without)
    if not chosen:
        raise BenchmarkError(f"nothing is known to score dataset '{dataset}' with: choose with --rewards")
    for name in (*chosen, *without):
        check_name(name)
    if limit is not None and limit < 1:
        raise BenchmarkError(f"a limit of {limit} prompts leaves nothing to evaluate")
    with_metadata = dataset in _WITH_METADATA or (folder / "test_metadata.jsonl").is_file()
    prompt_fn = task.get("prompt_fn") or ("geneval" if with_metadata else "general_ocr")
    prompts = load_folders(folders, prompt_fn, "test", trigger=task.get("trigger") or "")[0][:limit]
    if unfit := unfit_lines(prompts, chosen, options):
        raise PromptError(
            f"dataset '{dataset}' has prompts that cannot be scored. Repair or remove these lines, or choose with "
            f"--rewards what scores them:\n{listed(unfit)}"
        )
    num_steps = first(num_steps, task.get("eval_num_steps"), sample.get("eval_num_steps"))
    guidance_scale = first(guidance_scale, task.get("eval_guidance_scale"), sample.get("eval_guidance_scale"))
    return Benchmark(
        dataset if task or dataset in BENCHMARKS else folder.resolve().name,
        prompts,
        chosen,
        defaults().num_steps if num_steps is None else num_steps,
        defaults().guidance_scale if guidance_scale is None else guidance_scale,
    )
