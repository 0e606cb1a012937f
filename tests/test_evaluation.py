"""Evaluation end to end on an untrained model, and its parts on a stand-in for one."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusionopd.data.noise import Stream, generator
from diffusionopd.data.prompts import Prompt, PromptError
from diffusionopd.evaluation.evaluate import evaluate, evaluate_task
from diffusionopd.evaluation.job import Job, Model, lora_hash, settings_of
from diffusionopd.evaluation.results import (
    AVERAGES,
    RESULTS,
    SETTINGS,
    EvaluationError,
    Record,
    ResultFolder,
    read_averages,
    read_records,
)
from diffusionopd.evaluation.sampling import ImageGenerator, sample_latents
from diffusionopd.evaluation.testsets import BENCHMARKS, Benchmark, BenchmarkError, find_benchmark
from diffusionopd.models.conditions import NEGATIVE, Reference
from diffusionopd.models.loading import load_text_encoder
from diffusionopd.models.lora_files import load_lora
from diffusionopd.models.text_cache import TextCache
from diffusionopd.rewards import RewardError, to_uint8
from diffusionopd.training.checkpoint import CheckpointError, find_lora

from .conftest import ROOT
from .helpers import files_of

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

    scorers = [Mean(), Mean()]

    def process(rank: int) -> dict:
        how = {"batch_size": 3, "save_images": True, "images_per_prompt": 2, "rank": rank, "world": 2}
        return evaluate(generate, PROMPTS, {"mean": scorers[rank]}, tmp_path / "shared", **how)

    with ThreadPoolExecutor(2) as pool:
        summaries["first"], summaries["second"] = pool.map(process, (0, 1))
    assert [scorer.seen for scorer in scorers] == [11, 11]
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
    evaluate(generate, PROMPTS, {"mean": scorer}, broken, batch_size=3, save_images=True, resume=True)
    assert scorer.seen == 11 - 5, "what is finished is not made again"
    with pytest.raises(EvaluationError, match="rewards was"):
        evaluate(generate, PROMPTS, {"mean": Mean(), "other": Mean()}, broken, batch_size=3, resume=True)


def test_a_resume_with_another_reference_image_is_refused(tmp_path):
    """By its content, not by its path."""
    file, out = tmp_path / "a.png", tmp_path / "out"

    def scored(content: bytes, **how: bool) -> int:
        file.write_bytes(content)
        prompts = [replace(prompt, reference=Reference.to(file)) for prompt in PROMPTS]
        scorer = Mean()
        evaluate(generate, prompts, {"mean": scorer}, out, batch_size=4, **how)
        return scorer.seen

    assert (scored(b"one"), scored(b"one", resume=True)) == (11, 0)
    with pytest.raises(EvaluationError, match="sample 0 has another reference image"):
        scored(b"two", resume=True)


def test_in_memory_evaluation_by_one_process_and_two_equals_the_one_with_files(tmp_path, monkeypatch):
    files = evaluate(generate, PROMPTS, {"mean": Mean()}, tmp_path, batch_size=4)
    one = evaluate_task(generate, PROMPTS, {"mean": Mean()}, batch_size=3)
    assert one == {name: summary.mean for name, summary in files.items()}
    gathered: list[list] = []
    place = "diffusionopd.evaluation.evaluate.gather_over_processes"
    monkeypatch.setattr(place, lambda items: gathered.append(list(items)) or list(items))
    evaluate_task(generate, PROMPTS, {"mean": Mean()}, batch_size=3, rank=1, world=2)
    failures, other = gathered
    assert failures == []
    monkeypatch.setattr(place, lambda own: own and own + other)
    both = evaluate_task(generate, PROMPTS, {"mean": Mean()}, batch_size=3, rank=0, world=2)
    assert both == pytest.approx(one, rel=1e-12)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_in_memory_evaluation_stops_between_batches_on_every_process_alike(rank):
    """Three prompts in batches of one: two batches for one process and one for the other, asked twice each."""
    answers: list = [False, True]
    share = {"rank": rank, "world": 2, "stopped": lambda: answers.pop(0)}
    assert evaluate_task(generate, PROMPTS[:3], {"mean": Mean()}, batch_size=1, **share) is None and answers == []


@pytest.mark.parametrize("index", [0, 3])
def test_an_image_that_is_not_finite_is_named_with_the_remedy(index, tmp_path):
    """What was scored before is kept. In memory, a process draws on beside the others, the first prompt's image."""

    def broken(prompts, samples):
        images = generate(prompts, samples)
        images[[sample[0] == index for sample in samples], 0, 0, 0] = float("nan")
        return images

    facts = f"not finite.*'prompt {index}'.*mixed_precision bf16 or no"
    with pytest.raises(RewardError, match=facts) as caught:
        evaluate(broken, PROMPTS, {"mean": Mean()}, tmp_path, batch_size=2)
    assert str(caught.value).count("prompt ") == 1 and len(read_records(tmp_path / RESULTS)) == index // 2 * 2
    with pytest.raises(RewardError, match=f"rank 0.*{facts}"):
        evaluate_task(broken, PROMPTS, {"mean": Mean()}, batch_size=2, in_step=True)


# ---- sampling --------------------------------------------------------------------------------------------------------


def test_sampling_is_the_euler_method_written_out(backbone, text):
    positive, negative = text(3, 1), text(1, 2)
    latents = torch.randn(3, *backbone.latent_shape(64), generator=torch.Generator().manual_seed(0))
    backbone.negative = negative
    images = backbone.decode(sample_latents(backbone, positive, latents, 4, 2.0, resolution=64))
    sigmas = backbone.sigmas(4, 64).tolist()
    x = latents
    with torch.no_grad():
        for i in range(4):
            v, v_negative = (backbone.velocity(x, sigmas[i], text)[0] for text in (positive, negative.expand(3)))
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
    parts = torch.tensor([2, 6, 4, 0, 1, 3, 5][: max(3, batch_size)]).split(batch_size)
    images = torch.cat([make([prompts[i] for i in part], [(int(i), 0) for i in part]) for part in parts])
    difference = np.abs(to_uint8(images[:3]).astype(int) - wanted)
    assert difference.max() <= 1 and (difference > 0).mean() <= 0.001
    assert np.abs(wanted[0] - wanted[1]).mean() > 1  # and other prompts and noise give other images


# ---- what is evaluated -----------------------------------------------------------------------------------------------


def test_benchmarks_by_name_folder_and_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("dataset/drawbench", "assets/tiny/dataset/ocr", "mine"):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "test.txt").write_text('"one"\n"two"\n"three"\n')
    of = lambda task, **more: {"train": {"teachers": [task]}, **more}  # noqa: E731 (a configuration with one task)
    task = {"name": "ocr", "dataset": "assets/tiny/dataset/ocr", "prompt_fn": "general_ocr", "proxy_reward": {"ocr": 1}}
    assert find_benchmark("drawbench").rewards == BENCHMARKS["drawbench"][1]
    assert len(find_benchmark("drawbench", limit=2).prompts) == 2
    assert find_benchmark("ocr", of(task)).rewards == ("tiny_ocr",)
    assert find_benchmark("assets/tiny/dataset/ocr").rewards == ("tiny_ocr",)
    sample = {"eval_num_steps": 9, "eval_guidance_scale": 3.0}
    its = task | {"eval_guidance_scale": 1.0, "eval_num_steps": 7}
    for described, given, wanted in ((task, (), (9, 3.0)), (its, (), (7, 1.0)), (its, (5, 0.0), (5, 0.0))):
        found = find_benchmark("ocr", of(described, sample=sample), (), None, *given)
        assert (found.num_steps, found.guidance_scale) == wanted
    task |= {"dataset": "mine"}
    assert find_benchmark("ocr", of(task)).rewards == ("ocr",)
    more = {"dataset": None, "datasets": ["mine", "dataset/drawbench"], "trigger": "sks"}
    several = find_benchmark("ocr", of(task | more))
    assert [prompt.text for prompt in several.prompts] == ['sks, "one"', 'sks, "two"', 'sks, "three"'] * 2
    chosen = find_benchmark(str(tmp_path / "mine"), {}, ["jpeg_compressibility"])
    assert chosen.name == "mine" and chosen.rewards == ("jpeg_compressibility",)
    Path("bad").mkdir()
    Path("bad/test.txt").write_text("one\n\n'two'\nthree\n")
    of_a_file = task | {"dataset": "bad/test.txt"}
    for error, fact, *given in (
        (BenchmarkError, "--rewards", "mine"),
        (BenchmarkError, "nonesuch.*geneval, ocr", "nonesuch"),
        (BenchmarkError, "limit of 0", "mine", {}, ["ocr"], 0),
        (RewardError, "Did you mean", "mine", {}, ["jpeg_compressability"]),
        (PromptError, "bad/test.txt is one file, of training prompts.*folder with test.txt", "ocr", of(of_a_file)),
        (PromptError, "dataset/geneval/test_metadata.jsonl does not exist.*tools.download datasets", "geneval"),
        (PromptError, r"(?s)bad/test.txt, line 1: .*bad/test.txt, line 4: ", "bad", {}, ["ocr"]),
    ):
        with pytest.raises(error, match=fact) as caught:
            find_benchmark(*given)
    assert str(caught.value).count(", line ") == 2


def test_a_student_is_a_checkpoint_its_lora_or_a_lora_alone(tmp_path):
    checkpoint, alone = tmp_path / "run" / "checkpoints" / "checkpoint-30", tmp_path / "alone"
    for folder in (checkpoint / "lora", alone):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    (checkpoint / "config.json").write_text("{}")
    (checkpoint.parent / "latest").write_text("checkpoint-30\n")
    for path in (tmp_path / "run", checkpoint, checkpoint / "lora"):
        assert find_lora(str(path)).samefile(checkpoint)
    assert find_lora(str(alone)) == alone
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        find_lora(str(checkpoint.with_name("checkpoint-31")))


def test_a_lora_is_told_by_its_tensors_and_its_alpha(make_lora, tmp_path):
    path = make_lora(seed=1)
    shutil.copytree(path, tmp_path / "copy")
    lora, copy = load_lora(path), load_lora(tmp_path / "copy")
    name, changed = max(lora.a), replace(copy, alpha=dict(copy.alpha))
    assert lora_hash(lora) == lora_hash(copy)
    changed.alpha[name] *= 2
    assert lora_hash(changed) != lora_hash(lora)
    assert lora_hash(replace(lora, rslora=True)) != lora_hash(lora)
    copy.b[name] += 1
    assert lora_hash(copy) != lora_hash(lora)


def test_values_that_no_image_can_be_made_with():
    job, teacher = partial(Job, "model", output=Path("out")), Model("teacher-a", None, float("inf"))
    for values in ({"num_steps": 0}, {"guidance_scale": float("nan")}, {"guidance_scale": -1.0}):
        with pytest.raises(EvaluationError, match=next(iter(values))):
            job([BASE], [replace(MINE, **values)])
    for values in ({"resolution": 0}, {"seed": -1}, {"batch_size": 0}):
        with pytest.raises(EvaluationError, match=next(iter(values))):
            job([BASE], [MINE], **values)
    with pytest.raises(EvaluationError, match="guidance_scale"):
        job([teacher], [MINE])
    for models, benchmarks in (([BASE], [MINE, MINE]), ([BASE, BASE], [MINE]), ([], [MINE]), ([BASE], [])):
        with pytest.raises(EvaluationError, match="each once"):
            job(models, benchmarks)


def test_several_models_and_datasets_get_a_folder_each_and_a_model_may_have_its_own_guidance_and_dataset():
    other, teacher = replace(MINE, name="other"), Model("teacher-a", None, 1.0, only_on="other")
    assert (BASE.guidance_on(MINE), teacher.guidance_on(MINE)) == (4.5, 1.0)
    for models, benchmarks, place in (
        ([BASE], [MINE], "."), ([BASE], [MINE, other], "other"), ([BASE, teacher], [other], "teacher-a"),
        ([BASE, teacher], [MINE, other], "teacher-a/other"),
    ):  # fmt: skip
        job = Job("model", models, benchmarks, Path("out"))
        assert job.folder(models[-1], benchmarks[-1]) == Path("out", place)
    pairs = [(model.name, benchmark.name) for model, benchmark in job.evaluations]
    assert pairs == [("base", "mine"), ("base", "other"), ("teacher-a", "other")]


def test_reward_options_come_from_the_configuration_and_from_flags():
    read_options = runpy.run_path(str(ROOT / "scripts" / "evaluate.py"))["read_options"]
    configured = {"pickscore": {"model": "a", "dtype": "float32"}}
    given = ["pickscore.dtype=bfloat16", "unifiedreward.timeout=2.5", "unifiedreward.base_url=http://localhost:1/v1"]
    assert read_options(given, configured) == {
        "pickscore": {"model": "a", "dtype": "bfloat16"},
        "unifiedreward": {"timeout": 2.5, "base_url": "http://localhost:1/v1"},
    }
    assert configured == {"pickscore": {"model": "a", "dtype": "float32"}}


def test_an_evaluation_does_not_go_on_with_other_weights_of_its_base(pipeline_folder, tmp_path):
    base = shutil.copytree(pipeline_folder, tmp_path / "base")

    def described() -> dict:
        return settings_of(Job(str(base), [BASE], [MINE], tmp_path), BASE, MINE, torch.float32)

    before, folder = described(), tmp_path / "out"
    assert before == described()
    folder.mkdir()
    (folder / RESULTS).write_text(json.dumps(asdict(Record(0, "p", {}, {"r": 1.0}))) + "\n")
    weights = load_file(file := next((base / "transformer").glob("*.safetensors")))
    inner = "transformer_blocks.1.attn.to_q.weight"  # not at the beginning of the file, nor at its end
    save_file(weights | {inner: weights[inner] * 1.5}, file)
    (folder / SETTINGS).write_text(json.dumps(before))
    files = ResultFolder(folder)
    assert len(files.look(before, [Prompt("p")], resume=True).records) == 1
    with pytest.raises(EvaluationError, match="model_hash was"):
        files.look(described(), [Prompt("p")], resume=True)


@pytest.mark.parametrize(("options", "same"), [({"batch_size": 1, "device": "cuda:1"}, True), ({"dtype": "x"}, False)])
def test_where_and_in_what_batches_a_scorer_runs_makes_no_other_evaluation(options, same):
    job = Job("assets/tiny/model", [BASE], [replace(MINE, rewards=("geneval",))], Path("out"))
    found = [
        settings_of(each, BASE, job.benchmarks[0], torch.float32)
        for each in (job, replace(job, reward_options={"geneval": options}))
    ]
    assert (found[0] == found[1]) is same


# ---- the command -----------------------------------------------------------------------------------------------------


def tiny_run(model, teachers) -> dict:
    """A run's configuration, as `config.json` has it."""
    return {
        "pretrained": {"model": str(model)},
        "train": {"teachers": teachers},
        "sample": {"eval_num_steps": 2, "eval_guidance_scale": 1.5},
        "resolution": 64,
        "max_sequence_length": 14,
    }


@pytest.fixture
def dataset(tmp_path) -> Path:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "test.txt").write_text("".join(f"a photo of {n}\n" for n in "12345"))
    return tmp_path / "mine"


@pytest.fixture
def command(pipeline_folder, dataset, tmp_path):
    """`command(output, flag, ..., teachers=(), processes=1)`: the tables that it printed; files go to `output`."""

    def run(output: str, *flags: object, teachers=(), processes: int = 1) -> str:
        (tmp_path / "config.json").write_text(json.dumps(tiny_run(pipeline_folder, list(teachers))))
        common = ["--config", tmp_path / "config.json", "--dataset", dataset, "--rewards", "jpeg_compressibility"]
        common += ["--save_images", "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / output]
        start = [sys.executable, "scripts/evaluate.py"] if processes == 1 else ["bash", "scripts/single_node/eval.sh"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "ACCELERATE_USE_CPU": "true"}
        environment |= {"OMP_NUM_THREADS": "1", "NUM_PROCESSES": str(processes), "HF_HUB_OFFLINE": "1"}
        arguments = [*start, *map(str, [*common, *flags])]
        done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_one_process_and_two_write_the_same(command, make_lora, tmp_path):
    changed = {"resolution": 32, "num_inference_steps": 3, "guidance_scale": 2.0, "max_sequence_length": 13, "seed": 7}
    for processes, batch_size in ((1, 1), (2, 3)):
        flags = [flag for name, value in changed.items() for flag in (f"--{name}", value)]
        flags += ["--lora", make_lora(0), "--batch_size", batch_size]
        printed = command(str(processes), *flags, processes=processes)
        assert "jpeg_compressibility" in printed and printed.count("s.e.") == 1
    one, two = files_of(tmp_path / "1"), files_of(tmp_path / "2")
    assert list(one) == list(two) and len(one) == 5 + 3
    for first, second in zip(*(read_records(tmp_path / n / RESULTS) for n in "12"), strict=True):
        assert first.prompt == second.prompt
        assert first.scores == pytest.approx(second.scores, abs=0.02)
    assert json.loads(one[AVERAGES])["counts"] == {"jpeg_compressibility": 5}
    assert changed.items() <= json.loads(one[SETTINGS]).items(), "flags go before the configuration"


def scores_in(folder: Path, reward: str = "jpeg_compressibility") -> dict[str, float]:
    """The mean of each model in a folder of several."""
    return {path.parent.name: read_averages(path)[reward].mean for path in folder.glob(f"*/{AVERAGES}")}


@pytest.mark.slow
def test_several_models_in_one_start_equal_starts_of_their_own(command, make_lora, tmp_path):
    """One start over all models writes the very files of a start of each."""
    lora, second, run = make_lora(0), make_lora(1), tmp_path / "run"
    shutil.copytree(lora, run / "checkpoints" / "checkpoint-3" / "lora")
    (run / "checkpoints" / "latest").write_text("checkpoint-3")
    teachers = [{"name": "first", "lora_path": str(second), "guidance_scale": 2.0}]
    flags = ["--base", "--teacher", "first", "--checkpoint_path", run, "--lora", second]
    assert command("all", *flags, teachers=teachers).count("s.e.") == 4
    scores = scores_in(tmp_path / "all")
    assert scores.keys() == {"base", "teacher-first", "student", "lora"} and len(set(scores.values())) == 4
    for name in scores:
        settings = json.loads((tmp_path / "all" / name / SETTINGS).read_text())
        assert settings["guidance_scale"] == (2.0 if name == "teacher-first" else 1.5)
    command("alone", "--teacher", "first", teachers=teachers)
    assert files_of(tmp_path / "alone") == files_of(tmp_path / "all" / "teacher-first")


@pytest.mark.slow
def test_a_merge_is_scored_as_the_same_merge_from_a_file(command, make_lora, tmp_path):
    """``0.5 (0.8 A + B)`` of two teachers is what a LoRA of ranks side by side is, computed here by hand."""
    loras = [make_lora(0), make_lora(1)]
    a, b = map(load_lora, loras)
    teachers = [{"name": str(i), "lora_path": str(lora), "scale": (0.8, 1.0)[i]} for i, lora in enumerate(loras)]
    tensors = {}
    for module in a.a:
        scaled = [0.5 * scale * lora.scale_of(module) * lora.b[module] for scale, lora in ((0.8, a), (1.0, b))]
        tensors[f"transformer.{module}.lora_A.weight"] = torch.cat([a.a[module], b.a[module]])
        tensors[f"transformer.{module}.lora_B.weight"] = torch.cat(scaled, dim=1)
    save_file(tensors, tmp_path / "byhand.safetensors")
    smooth = ("--rewards", "tiny_scene")  # as a file's size is not
    command("merged", "--merge", "sum", "ties", "--merge_scale", 0.5, 1, *smooth, teachers=teachers)
    command("byhand", "--lora", tmp_path / "byhand.safetensors", *smooth)
    scores = scores_in(tmp_path / "merged", "tiny_scene")
    assert scores.keys() == {"merge-sum-0.5", "merge-sum", "merge-ties-0.5", "merge-ties"}
    wanted = read_averages(tmp_path / "byhand" / AVERAGES)["tiny_scene"].mean
    assert len(set(scores.values())) == 4 and scores["merge-sum-0.5"] == pytest.approx(wanted, abs=1e-4)


def test_loras_of_one_folder_name_have_names_of_their_own_and_another_base_no_revision_of_the_runs(tmp_path):
    script = runpy.run_path(str(ROOT / "scripts" / "evaluate.py"))
    run = tiny_run("owner/model", []) | {"pretrained": {"model": "owner/model", "revision": "abc"}}
    (tmp_path / "config.json").write_text(json.dumps(run))
    loras = [f"assets/tiny/teachers/{task}/lora" for task in ("compose", "ocr")]
    flags = ["--lora", loras[0], "--lora", loras[1], "--config", str(tmp_path / "config.json")]
    flags += ["--dataset", "scene", "--model", "assets/tiny/model", "--output_dir", str(tmp_path / "out")]
    job = script["make_job"](script["parse_flags"](flags))
    assert [model.name for model in job.models] == ["compose-lora", "ocr-lora"] and job.revision is None


def test_a_flag_that_takes_several_may_come_several_times():
    parse = runpy.run_path(str(ROOT / "scripts" / "evaluate.py"))["parse_flags"]
    flags = parse("--base --output_dir x --dataset a --dataset b c --without r --without s t".split())
    assert (flags.dataset, flags.without) == (["a", "b", "c"], ["r", "s", "t"])


def test_a_dry_run_builds_scorers_and_fits_loras_and_makes_nothing(tmp_path, capsys, monkeypatch):
    lora = {f"transformer.nonesuch.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(lora, tmp_path / "lora.safetensors")
    arguments = ["--dataset", "scene", "--model", "assets/tiny/model", "--output_dir", tmp_path / "out", "--dry_run"]
    arguments += ["--rewards", "unifiedreward", "jpeg_compressibility", "--config", "config/tiny.py:mopd"]
    script = str(ROOT / "scripts" / "evaluate.py")
    monkeypatch.chdir(ROOT)
    for flags, fact in ((["--base"], "does not answer"), (["--lora", tmp_path / "lora.safetensors"], "nonesuch")):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, [*arguments, *flags])])
        with pytest.raises(SystemExit, match=fact):
            runpy.run_path(script, run_name="__main__")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments), "--base", "--without", "unifiedreward"])
    runpy.run_path(script, run_name="__main__")
    assert "base on scene: 384 images" in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--base --dataset nonesuch", "neither a folder in"),
        ("--base", "choose with --rewards"),
        ("--base --rewards jpg", "unknown reward 'jpg'"),
        ("--checkpoint_path logs/none", "no checkpoint at logs/none"),
        ("--lora nowhere/at/all.safetensors --rewards ocr", "nowhere/at/all"),
        ("--teacher ocr", "name a configuration with --config"),
        ("--merge sum --lora LORA --rewards ocr", "at least two"),
        ("--merge sum --rewards ocr", "at least two"),
        ("--merge ties --config MODELS --rewards ocr", "only LoRAs"),
        ("--teacher x --config config/tiny.py:mopd", "compose, ocr, scene"),
        ("--base --config config/tiny.py:nonesuch", "has no 'nonesuch'"),
        ("--base --config README.json", "is not the config.json of a run"),
        ("--base --rewards aesthetic --guidance_scale -1", "at least 0"),
        ("--base --rewards aesthetic --num_inference_steps 0", "at least 1"),
        ("--base --rewards aesthetic --reward_options aesthetic", "REWARD.OPTION=VALUE"),
        ("--base --rewards aesthetic --reward_options aesthetic.x=1", "its options:"),
        ("--base --rewards aesthetic --resolution 2048", "multiple of 8 up to 128"),
        ("--merge sum --merge_scale 0.5 --merge_scale inf --lora LORA LORA", "--merge_scale inf"),
        ("--base --rewards jpeg_compressibility --resolution 64 --vae_device cuda:7", "vae_device is 'cuda:7'"),
        ("--base --rewards aesthetic --resolution 64 --dataset IMAGES", "reference_image, which"),
    ],
)
def test_bad_flags_end_in_one_line(flags, message, dataset, make_lora, tmp_path, monkeypatch):
    teachers = [{"name": "a", "model": "owner/large", "lora_path": "x"}, {"name": "b", "lora_path": "somewhere"}]
    (tmp_path / "config.json").write_text(json.dumps(tiny_run("owner/model", teachers)))
    (tmp_path / "edits").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "edits" / "a.png")
    edit = {"prompt": "bluer", "reference_image": "a.png"}
    (tmp_path / "edits" / "test_metadata.jsonl").write_text(json.dumps(edit))
    places = {"LORA": make_lora(0), "MODELS": tmp_path / "config.json", "IMAGES": tmp_path / "edits"}
    arguments = ["--dataset", dataset, "--model", "assets/tiny/model", "--output_dir", tmp_path / "out"]
    arguments += [places.get(flag, flag) for flag in flags.split()]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")
    assert str(stop.value).startswith("error: ") and message in str(stop.value)
    assert not (tmp_path / "out").exists()
