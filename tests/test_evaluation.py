"""Evaluation end to end on an untrained model, and its parts on a stand-in for one."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusionopd.data.noise import Stream, generator
from diffusionopd.data.prompts import Prompt, PromptError
from diffusionopd.evaluation.evaluate import evaluate, evaluate_task
from diffusionopd.evaluation.job import Job, Model
from diffusionopd.evaluation.results import AVERAGES, RESULTS, SETTINGS, EvaluationError, read_averages, read_records
from diffusionopd.evaluation.sampling import ImageGenerator, sample_images
from diffusionopd.evaluation.testsets import BENCHMARKS, Benchmark, BenchmarkError, find_benchmark
from diffusionopd.models.conditions import NEGATIVE
from diffusionopd.models.loading import load_text_encoder
from diffusionopd.models.lora_files import load_lora
from diffusionopd.models.text_cache import TextCache
from diffusionopd.rewards import RewardError, to_uint8
from diffusionopd.training.checkpoint import CheckpointError, find_lora

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = [Prompt(f"prompt {i}", {"number": i}) for i in range(11)]

MINE = Benchmark("mine", PROMPTS, ("ocr",), num_steps=40, guidance_scale=4.5)
BASE = Model("base")


def generate(prompts, samples):
    """Images that depend on the sample alone, as the real ones do."""
    return torch.stack([torch.rand(3, 16, 16, generator=generator(Stream.EVALUATION, *sample)) for sample in samples])


class Mean:
    """Mean level, and the prompt's number; counts the images that it is shown."""

    def __init__(self) -> None:
        self.seen = 0

    def score(self, images, prompts, metadata):
        self.seen += len(prompts)
        number = np.array([entry["number"] for entry in metadata])
        return {"mean": to_uint8(images).mean(axis=(1, 2, 3)), "number": np.where(number == 3, -10.0, number)}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- the loop --------------------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_batch_size_or_processes(tmp_path, monkeypatch):
    summaries = {}
    for batch_size in (1, 4, 32):
        folder = tmp_path / str(batch_size)
        summaries[batch_size] = evaluate(
            generate, PROMPTS, {"mean": Mean()}, folder, batch_size=batch_size, save_images=True, images_per_prompt=2
        )
    both = threading.Barrier(2, timeout=60)
    monkeypatch.setattr("diffusionopd.evaluation.evaluate.barrier", lambda *_: both.wait())

    def process(rank: int) -> dict:
        return evaluate(
            generate, PROMPTS, {"mean": Mean()}, tmp_path / "shared", batch_size=3, save_images=True,
            images_per_prompt=2, rank=rank, world=2,
        )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        summaries["first"], summaries["second"] = pool.map(process, (0, 1))
    wanted = files_of(tmp_path / "1")
    assert len(wanted) == 22 + 3
    for name in ("4", "32", "shared"):
        assert files_of(tmp_path / name) == wanted
    assert len({str(summary) for summary in summaries.values()}) == 1
    assert summaries[1]["mean"].count == 22 and summaries[1]["number"].count == 20


def test_killed_and_resumed_gives_the_same_files(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    evaluate(generate, PROMPTS, {"mean": Mean()}, whole, batch_size=3, save_images=True)

    def dying(prompts, samples):
        if samples[0][0] >= 6:
            raise KeyboardInterrupt
        return generate(prompts, samples)

    with pytest.raises(KeyboardInterrupt):
        evaluate(dying, PROMPTS, {"mean": Mean()}, broken, batch_size=3, save_images=True)
    results = broken / RESULTS
    results.write_bytes(results.read_bytes()[:-7])  # the kill came in the middle of a line
    scorer = Mean()
    evaluate(generate, PROMPTS, {"mean": scorer}, broken, batch_size=3, save_images=True, resume=True)
    assert scorer.seen == 11 - 5
    assert files_of(broken) == files_of(whole)


def test_a_finished_evaluation_makes_nothing_again(tmp_path):
    first = evaluate(generate, PROMPTS, {"mean": Mean()}, tmp_path, batch_size=4)
    scorer = Mean()
    assert evaluate(generate, PROMPTS, {"mean": scorer}, tmp_path, batch_size=4, resume=True) == first
    assert scorer.seen == 0


def test_a_resume_with_other_rewards_is_refused(tmp_path):
    evaluate(generate, PROMPTS, {"mean": Mean()}, tmp_path, batch_size=4)
    with pytest.raises(EvaluationError, match="rewards was"):
        evaluate(generate, PROMPTS, {"mean": Mean(), "other": Mean()}, tmp_path, batch_size=4, resume=True)


def test_in_memory_evaluation_equals_the_one_with_files(tmp_path):
    files = evaluate(generate, PROMPTS, {"mean": Mean()}, tmp_path, batch_size=4)
    means = evaluate_task(generate, PROMPTS, {"mean": Mean()}, batch_size=3)
    assert means == {name: summary.mean for name, summary in files.items()}


def test_in_memory_evaluation_by_two_processes(monkeypatch):
    gathered: list[list] = []

    def gather(items):
        gathered.append(list(items))
        return list(items)

    monkeypatch.setattr("diffusionopd.evaluation.evaluate.gather_over_processes", gather)
    evaluate_task(generate, PROMPTS, {"mean": Mean()}, batch_size=3, rank=1, world=2)
    failures, other = gathered
    assert failures == []
    monkeypatch.setattr("diffusionopd.evaluation.evaluate.gather_over_processes", lambda own: own and own + other)
    both = evaluate_task(generate, PROMPTS, {"mean": Mean()}, batch_size=3, rank=0, world=2)
    monkeypatch.undo()
    assert both == pytest.approx(evaluate_task(generate, PROMPTS, {"mean": Mean()}, batch_size=3), rel=1e-12)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_in_memory_evaluation_stops_between_batches_on_every_process_alike(rank):
    """Three prompts in batches of one: two batches for one process and one for the other, asked twice each."""
    answers: list = [False, True]
    means = evaluate_task(
        generate,
        PROMPTS[:3],
        {"mean": Mean()},
        batch_size=1,
        rank=rank,
        world=2,
        stopped=lambda: answers.pop(0),
    )
    assert means is None and answers == []


# ---- sampling --------------------------------------------------------------------------------------------------------


def test_sampling_is_the_euler_method_written_out(backbone, text):
    positive, negative = text(3, 1), text(1, 2)
    latents = torch.randn(3, *backbone.latent_shape(64), generator=torch.Generator().manual_seed(0))
    backbone.negative = negative
    images = sample_images(backbone, positive, latents, 4, 2.0, resolution=64)
    sigmas = backbone.sigmas(4, 64).tolist()
    x = latents
    with torch.no_grad():
        for i in range(4):
            v, v_negative = (
                backbone.velocity(x, sigmas[i], positive)[0],
                backbone.velocity(x, sigmas[i], negative.expand(3))[0],
            )
            x = x + (sigmas[i + 1] - sigmas[i]) * (v_negative + 2.0 * (v - v_negative))
        wanted = backbone.decode(x)
    assert images.shape == (3, 3, 64, 64)
    torch.testing.assert_close(images, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_an_image_does_not_depend_on_its_neighbours(batch_size, backbone, pipeline_folder, tmp_path):
    """At most one of 255 levels apart, in at most 0.1% of the values: products of other shapes round differently."""
    prompts = [f"a photo of {word}" for word in ("one", "two", "three", "four", "five", "six", "seven")]
    cache = TextCache(tmp_path, "key", 14, torch.float32)
    cache.fill([NEGATIVE, *prompts], lambda: load_text_encoder(str(pipeline_folder), max_sequence_length=14))
    backbone.negative = cache.get([NEGATIVE])
    make = ImageGenerator(backbone, cache, num_steps=4, guidance_scale=2.0, resolution=64, seed=3)
    wanted = to_uint8(make(prompts, [(i, 0) for i in range(7)])[[2, 6, 4]]).astype(int)
    shuffled = [2, 6, 4, 0, 1, 3, 5][: max(3, batch_size)]
    images = torch.cat(
        [
            make([prompts[i] for i in part], [(i, 0) for i in part])
            for part in (shuffled[k : k + batch_size] for k in range(0, len(shuffled), batch_size))
        ]
    )
    difference = np.abs(to_uint8(images[:3]).astype(int) - wanted)
    assert difference.max() <= 1 and (difference > 0).mean() <= 0.001
    assert np.abs(wanted[0] - wanted[1]).mean() > 1  # and other prompts and noise give other images


# ---- what is evaluated -----------------------------------------------------------------------------------------------


def of(task: dict) -> dict:
    """A configuration with one task."""
    return {"train": {"teachers": [task]}}


def test_benchmarks_by_name_folder_and_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("dataset/drawbench", "assets/tiny/dataset/ocr", "mine"):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "test.txt").write_text('"one"\n"two"\n"three"\n')
    task = {
        "name": "ocr", "dataset": "assets/tiny/dataset/ocr", "prompt_fn": "general_ocr", "proxy_reward": {"ocr": 1.0},
    }  # fmt: skip
    assert find_benchmark("drawbench").rewards == BENCHMARKS["drawbench"][1]
    assert len(find_benchmark("drawbench", limit=2).prompts) == 2
    assert find_benchmark("ocr", of(task)).rewards == ("tiny_ocr",)
    assert find_benchmark("assets/tiny/dataset/ocr").rewards == ("tiny_ocr",)
    sample = {"eval_num_steps": 9, "eval_guidance_scale": 3.0}
    common = find_benchmark("ocr", of(task) | {"sample": sample})
    assert (common.guidance_scale, common.num_steps) == (3.0, 9)
    config = of(task | {"eval_guidance_scale": 1.0, "eval_num_steps": 7}) | {"sample": sample}
    for given, wanted in (((), (7, 1.0)), ((5, 2.0), (5, 2.0))):
        own = find_benchmark("ocr", config, (), None, *given)
        assert (own.num_steps, own.guidance_scale) == wanted
    task |= {"dataset": "mine"}
    assert find_benchmark("ocr", of(task)).rewards == ("ocr",)
    several = find_benchmark("ocr", of(task | {"dataset": None, "datasets": ["mine", "dataset/drawbench"]}))
    assert [prompt.text for prompt in several.prompts] == ['"one"', '"two"', '"three"'] * 2
    chosen = find_benchmark(str(tmp_path / "mine"), {}, ["jpeg_compressibility"])
    assert chosen.name == "mine" and chosen.rewards == ("jpeg_compressibility",)
    with pytest.raises(BenchmarkError, match="--rewards"):
        find_benchmark("mine")
    with pytest.raises(BenchmarkError, match="nonesuch.*geneval, ocr"):
        find_benchmark("nonesuch")
    with pytest.raises(RewardError, match="Did you mean"):
        find_benchmark("mine", {}, ["jpeg_compressability"])
    with pytest.raises(
        PromptError, match="dataset/geneval/test_metadata.jsonl does not exist.*tools.download datasets"
    ):
        find_benchmark("geneval")
    Path("mine/test.txt").write_text("one\n\n'two'\nthree\n")
    with pytest.raises(PromptError) as caught:
        find_benchmark("mine", {}, ["ocr"])
    assert re.findall(r"mine/test.txt, line (\d+): ", str(caught.value)) == ["1", "4"]
    with pytest.raises(BenchmarkError, match="limit of 0"):
        find_benchmark("mine", {}, ["ocr"], limit=0)


def test_checkpoints_are_found_however_they_are_named(tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-30"
    (checkpoint / "lora").mkdir(parents=True)
    (checkpoint / "lora" / "adapter_config.json").write_text("{}")
    (checkpoint / "config.json").write_text("{}")
    (checkpoint.parent / "latest").write_text("checkpoint-30\n")
    for path in ("run", "run/checkpoints", "run/checkpoints/latest", "run/latest", "run/checkpoints/checkpoint-30",
                 "run/checkpoints/checkpoint-30/lora"):  # fmt: skip
        assert find_lora(str(tmp_path / path)).samefile(checkpoint), path
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "adapter_config.json").write_text("{}")
    assert find_lora(str(alone)) == alone
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        find_lora(str(tmp_path / "run" / "checkpoints" / "checkpoint-31"))


def test_values_that_no_image_can_be_made_with():
    for values in ({"num_steps": 0}, {"guidance_scale": float("nan")}, {"guidance_scale": -1.0}):
        with pytest.raises(EvaluationError, match=next(iter(values))):
            Job("model", [BASE], [replace(MINE, **values)], Path("out"))
    for values in ({"resolution": 70}, {"resolution": 0}, {"seed": -1}, {"batch_size": 0}):
        with pytest.raises(EvaluationError, match=next(iter(values))):
            Job("model", [BASE], [MINE], Path("out"), **values)
    with pytest.raises(EvaluationError, match="guidance_scale"):
        Job("model", [Model("teacher-a", None, float("inf"))], [MINE], Path("out"))
    for models, benchmarks in (([BASE], [MINE, MINE]), ([BASE, BASE], [MINE]), ([], [MINE]), ([BASE], [])):
        with pytest.raises(EvaluationError, match="each once"):
            Job("model", models, benchmarks, Path("out"))


def test_a_models_own_guidance_goes_before_that_of_the_benchmark():
    assert (BASE.guidance_on(MINE), Model("teacher-a", None, 1.0).guidance_on(MINE)) == (4.5, 1.0)


def test_several_models_and_datasets_get_a_folder_each():
    other, teacher = replace(MINE, name="other"), Model("teacher-a")
    folders = {}
    for models, benchmarks in (([BASE], [MINE]), ([BASE], [MINE, other]), ([BASE, teacher], [MINE])):
        job = Job("model", models, benchmarks, Path("out"))
        folders[len(models), len(benchmarks)] = job.folder(models[-1], benchmarks[-1])
    both = Job("model", [BASE, teacher], [MINE, other], Path("out"))
    assert folders == {(1, 1): Path("out"), (1, 2): Path("out/other"), (2, 1): Path("out/teacher-a")}
    assert both.folder(teacher, other) == Path("out/teacher-a/other")
    own = replace(both, models=[BASE, replace(teacher, only_on="other")])
    assert [(m.name, b.name) for m, b in own.evaluations] == [
        ("base", MINE.name), ("base", "other"), ("teacher-a", "other")
    ]  # fmt: skip


def test_reward_options_come_from_the_configuration_and_from_flags(tmp_path):
    script = runpy.run_path(str(ROOT / "scripts" / "evaluate.py"))
    configured = {"pickscore": {"model": "a", "dtype": "float32"}}
    given = ["pickscore.dtype=bfloat16", "unifiedreward.timeout=2.5", "unifiedreward.base_url=http://localhost:1/v1"]
    assert script["read_options"](given, configured) == {
        "pickscore": {"model": "a", "dtype": "bfloat16"},
        "unifiedreward": {"timeout": 2.5, "base_url": "http://localhost:1/v1"},
    }
    assert configured == {"pickscore": {"model": "a", "dtype": "float32"}}
    assert script["read_options"](["ocr.engine=paddleocr"], {}) == {"ocr": {"engine": "paddleocr"}}


# ---- the command -----------------------------------------------------------------------------------------------------


def command(*flags: object, processes: int = 1) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "ACCELERATE_USE_CPU": "true"}
    environment |= {"OMP_NUM_THREADS": "1", "NUM_PROCESSES": str(processes), "HF_HUB_OFFLINE": "1"}
    start = [sys.executable, "scripts/evaluate.py"] if processes == 1 else ["bash", "scripts/single_node/eval.sh"]
    arguments = [str(flag) for flag in flags]
    return subprocess.run([*start, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prompts") / "mine"
    folder.mkdir()
    (folder / "test.txt").write_text(
        "".join(f"a photo of {word}\n" for word in ("one", "two", "three", "four", "five"))
    )
    return folder


@pytest.mark.slow
def test_one_process_and_two_write_the_same(pipeline_folder, make_lora, dataset, tmp_path):
    common = ["--model", pipeline_folder, "--dataset", dataset, "--rewards", "jpeg_compressibility", "--resolution", 64]
    common += ["--num_inference_steps", 2, "--guidance_scale", 1.5, "--max_sequence_length", 14, "--save_images"]
    common += ["--lora", make_lora(0), "--cache_dir", tmp_path / "cache"]
    for processes, batch_size in ((1, 1), (2, 3)):
        flags = [*common, "--output_dir", tmp_path / str(processes), "--batch_size", batch_size]
        done = command(*flags, processes=processes)
        assert done.returncode == 0, done.stderr
        assert "jpeg_compressibility" in done.stdout and done.stdout.count("s.e.") == 1
    one, two = files_of(tmp_path / "1"), files_of(tmp_path / "2")
    assert list(one) == list(two) and len(one) == 5 + 3
    for first, second in zip(*(read_records(tmp_path / n / RESULTS) for n in "12"), strict=True):
        assert first.prompt == second.prompt
        assert first.scores == pytest.approx(second.scores, abs=0.02)
    averages = json.loads(one["average_scores.json"])
    assert averages["counts"] == {"jpeg_compressibility": 5}


@pytest.mark.slow
def test_several_models_in_one_start_equal_starts_of_their_own(pipeline_folder, make_lora, dataset, tmp_path):
    """One start over all models writes the very files of a start of each."""
    lora, second = make_lora(0), make_lora(1)
    run = tmp_path / "run"
    shutil.copytree(lora, run / "checkpoints" / "checkpoint-3" / "lora")
    (run / "checkpoints" / "latest").write_text("checkpoint-3")
    config = tiny_run(pipeline_folder, [{"name": "first", "lora_path": str(second), "guidance_scale": 2.0}])
    (tmp_path / "config.json").write_text(json.dumps(config))
    common = ["--config", tmp_path / "config.json", "--dataset", dataset, "--rewards", "jpeg_compressibility"]
    common += ["--num_inference_steps", 2, "--save_images", "--cache_dir", tmp_path / "cache", "--resume"]
    which = {
        "base": ["--base"],
        "teacher-first": ["--teacher", "first"],
        "student": ["--checkpoint_path", run],
        "lora": ["--lora", second],
    }
    flags = [flag for given in which.values() for flag in given]
    done = command(*common, *flags, "--output_dir", tmp_path / "all")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("s.e.") == 4
    averages = {}
    for name in which:
        averages[name] = json.loads((tmp_path / "all" / name / AVERAGES).read_text())["jpeg_compressibility"]
        settings = json.loads((tmp_path / "all" / name / SETTINGS).read_text())
        assert settings["guidance_scale"] == (2.0 if name == "teacher-first" else 1.5)
    assert len(set(averages.values())) == 4
    done = command(*common, "--teacher", "first", "--output_dir", tmp_path / "alone")
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "alone") == files_of(tmp_path / "all" / "teacher-first")


@pytest.mark.slow
def test_a_merge_is_scored_as_the_same_merge_from_a_file(pipeline_folder, make_lora, dataset, tmp_path):
    """``0.5 (0.8 A + B)`` of two teachers is what a LoRA of ranks side by side is, computed here by hand."""
    loras = [make_lora(0), make_lora(1)]
    a, b = map(load_lora, loras)
    teachers = [{"name": str(i), "lora_path": str(lora)} for i, lora in enumerate(loras)]
    config = tiny_run(pipeline_folder, [teachers[0] | {"scale": 0.8}, teachers[1]])
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {}
    for module in a.a:
        scaled = [0.5 * scale * lora.scale_of(module) * lora.b[module] for scale, lora in ((0.8, a), (1.0, b))]
        tensors[f"transformer.{module}.lora_A.weight"] = torch.cat([a.a[module], b.a[module]])
        tensors[f"transformer.{module}.lora_B.weight"] = torch.cat(scaled, dim=1)
    save_file(tensors, tmp_path / "byhand.safetensors")
    common = ["--config", tmp_path / "config.json", "--dataset", dataset, "--rewards", "jpeg_compressibility"]
    common += ["--num_inference_steps", 2, "--cache_dir", tmp_path / "cache", "--save_images"]
    done = command(*common, "--merge", "sum", "ties", "--merge_scale", 0.5, 1, "--output_dir", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    done = command(*common, "--lora", tmp_path / "byhand.safetensors", "--output_dir", tmp_path / "byhand")
    assert done.returncode == 0, done.stderr
    folders = {
        name: tmp_path / "merged" / name for name in ("merge-sum-0.5", "merge-sum", "merge-ties-0.5", "merge-ties")
    }
    scores = {name: read_averages(folder / AVERAGES)["jpeg_compressibility"].mean for name, folder in folders.items()}
    assert len(set(scores.values())) == 4
    wanted = read_averages(tmp_path / "byhand" / AVERAGES)["jpeg_compressibility"].mean
    assert scores["merge-sum-0.5"] == pytest.approx(wanted, abs=0.02)


def tiny_run(model, teachers) -> dict:
    """A run's configuration, as `config.json` has it."""
    return {
        "pretrained": {"model": str(model)},
        "train": {"teachers": teachers},
        "sample": {"eval_num_steps": 2, "eval_guidance_scale": 1.5},
        "resolution": 64,
        "max_sequence_length": 14,
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base", "--dataset", "nonesuch"], "neither a folder in"),
        (["--base", "--dataset", "DATASET"], "choose with --rewards"),
        (["--base", "--dataset", "DATASET", "--rewards", "jpg"], "unknown reward 'jpg'"),
        (["--checkpoint_path", "logs/none", "--dataset", "DATASET"], "no checkpoint at logs/none"),
        (["--lora", "nowhere/at/all.safetensors", "--dataset", "DATASET", "--rewards", "ocr"], "nowhere/at/all"),
        (["--teacher", "ocr", "--dataset", "DATASET"], "name a configuration with --config"),
        (["--merge", "sum", "--lora", "LORA", "--dataset", "DATASET", "--rewards", "ocr"], "at least two"),
        (["--merge", "sum", "--dataset", "DATASET", "--rewards", "ocr"], "at least two"),
        (["--merge", "ties", "--config", "MODELS", "--dataset", "DATASET", "--rewards", "ocr"], "only LoRAs"),
        (["--teacher", "x", "--config", "config/tiny.py:mopd", "--dataset", "DATASET"], "compose, ocr, scene"),
        (["--base", "--config", "config/tiny.py:nonesuch", "--dataset", "DATASET"], "has no 'nonesuch'"),
        (["--base", "--config", "README.json", "--dataset", "DATASET"], "is not the config.json of a run"),
        (["--base", "--dataset", "DATASET", "--rewards", "aesthetic", "--guidance_scale", "-1"], "at least 0"),
        (
            ["--base", "--dataset", "DATASET", "--rewards", "aesthetic", "--reward_options", "aesthetic"],
            "REWARD.OPTION=VALUE",
        ),
        (
            ["--base", "--dataset", "DATASET", "--rewards", "aesthetic", "--reward_options", "aesthetic.x=1"],
            "its options:",
        ),
    ],
)
def test_bad_flags_end_in_one_line(flags, message, dataset, make_lora, tmp_path, monkeypatch, capsys):
    teachers = [{"name": "a", "model": "owner/large"}, {"name": "b", "lora_path": "somewhere"}]
    (tmp_path / "config.json").write_text(json.dumps(tiny_run("owner/model", teachers)))
    places = {"DATASET": dataset, "LORA": make_lora(0), "MODELS": tmp_path / "config.json"}
    arguments = [str(places.get(flag, flag)) for flag in flags]
    base = [] if "--model" in flags else ["--model", "assets/tiny/model"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments, *base, "--output_dir", str(tmp_path / "out")])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")
    assert str(stop.value).startswith("error: ") and message in str(stop.value)
    assert not (tmp_path / "out").exists()
