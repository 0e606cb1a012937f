"""A base that is sharded over processes trains the same student as one that is not, and is resumed alike."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from diffusionopd.data.prompts import Prompt
from diffusionopd.evaluation.evaluate import evaluate_task
from diffusionopd.launch import worker_environments
from diffusionopd.models import sharding as engine
from diffusionopd.models.loading import load_backbone
from diffusionopd.models.sharding import EngineError, requested_sharding
from diffusionopd.rewards import RewardError
from diffusionopd.training import check, loading, loop, train

from .conftest import ROOT
from .forked import fork
from .helpers import assert_bitwise, assert_equal_rounds, metrics, state

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "DS_ACCELERATOR": "cpu",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
}  # fmt: skip


def train_sharded(environment: dict[str, str], config, most: float = 0.6) -> None:
    """Train in two processes; the first holds half of the base, and its small layers between steps (at ``most`` that
    share in all), or all of it."""

    def work(rank):
        os.environ.update(environment)
        save = loop._save

        def counting(run, *rest):
            base = {n: p for n, p in run.backbone.transformer.named_parameters() if ".lora_" not in n}
            shares = [getattr(p, "ds_tensor", p.to_local() if hasattr(p, "to_local") else p) for p in base.values()]
            loras = [p for name in run.adapters.configs for p in run.adapters.parameters(name)]
            assert all(type(p) is torch.nn.Parameter and p.numel() > 0 for p in loras), "LoRAs are not sharded"
            print(f"\nheld {sum(share.numel() for share in shares)}")
            return save(run, *rest)

        loop._save = counting
        train(config)

    total = sum(p.numel() for p in load_backbone(config.pretrained.model).transformer.parameters())
    held = int(re.findall(r"held (\d+)", fork(work, 2)[0].out)[-1])
    assert held < most * total if environment else held == total


def last(logs: Path, name: str) -> dict[str, torch.Tensor]:
    """The state of a run's newest checkpoint."""
    root = logs / name / "checkpoints"
    return state(root / (root / "latest").read_text().strip())


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        if name.startswith(("student", "ema", "old")):
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=5e-5)


LARGE = {"sample__train_batch_size": 4, "train__batch_size": 4}
GUIDED = {"train__cfg": True, "sample__guidance_scale": 2.0, "num_epochs": 2, "eval_freq": 2}
NFT = {"train__algorithm": "nft", "num_epochs": 1}


@pytest.mark.parametrize("resumed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["whole", "resumed"])
def test_sharded_training_is_that_of_one_process_and_resumes_either_way(tiny_config, tmp_path, resumed):
    """Two teachers, guidance, noise, EMA, and an evaluation whose three prompts do not divide by two processes."""
    common = GUIDED | {"sample__noise_level": 0.7, "train__ema": True, "train__ema_interval": 1, "save_freq": 1}
    logs = tmp_path / "logs"
    train(tiny_config(run_name="one", **common, **LARGE))
    train_sharded(FSDP, tiny_config(run_name="sharded", **common))
    assert_equal_rounds(metrics(logs / "one"), metrics(logs / "sharded"), rel=2e-3)
    assert "eval/first/jpeg_compressibility" in metrics(logs / "sharded")[-1]
    assert_same(last(logs, "one"), last(logs, "sharded"))
    if resumed:
        starts = {name: str(logs / name / "checkpoints" / "checkpoint-1") for name in ("one", "sharded")}
        train_sharded(FSDP, tiny_config(run_name="from one", resume_from=starts["one"], **common))
        train(tiny_config(run_name="to one", resume_from=starts["sharded"], **common, **LARGE))
        for name in ("from one", "to one"):
            assert_same(last(logs, "one"), last(logs, name))


@pytest.mark.slow
def test_other_precisions_and_algorithms_on_a_sharded_base(tiny_config, tmp_path):
    """A half precision base, float32 LoRAs and recomputed blocks, against two processes with all of it each; NFT
    adds its old policy to a base that is sharded already, and has a teacher that is another transformer."""
    logs = tmp_path / "logs"
    half = {"num_epochs": 1, "mixed_precision": "bf16", "activation_checkpointing": True}
    for where in (FSDP, {}):
        train_sharded(where, tiny_config(run_name=f"half{len(where)}", **half))
    assert_bitwise(last(logs, f"half{len(FSDP)}"), last(logs, "half0"))
    configs = tiny_config(run_name="nft", **NFT), tiny_config(run_name="nft one", **NFT, **LARGE)
    for config in configs:
        config.train.distill_weight = 1.0
        config.train.teachers[1] |= {"model": config.pretrained.model, "lora_path": ""}
    train_sharded(FSDP, configs[0])
    train(configs[1])
    assert any(name.startswith("old.") for name in last(logs, "nft"))
    assert_same(last(logs, "nft one"), last(logs, "nft"))


@pytest.mark.slow
@pytest.mark.skipif(not engine.is_deepspeed_available(), reason="needs deepspeed")
def test_zero3_trains_the_same_student(tiny_config, tmp_path):
    for name, options in (("opd", GUIDED), ("nft", NFT)):
        ends = ("sharded", ZERO3), ("complete", {})
        for end, where in ends:
            train_sharded(where, tiny_config(run_name=f"{name} {end}", **options))
        assert_equal_rounds(*(metrics(tmp_path / "logs" / f"{name} {end}") for end, _ in ends), rel=2e-3)
        assert_same(*(last(tmp_path / "logs", f"{name} {end}") for end, _ in ends))


@pytest.fixture
def ask(monkeypatch):
    """`ask(NAME=value, ...)`: these variables are in the environment."""
    monkeypatch.setattr(engine, "is_deepspeed_available", lambda: True)
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


def test_what_cannot_be_run_as_it_says_is_refused(ask, monkeypatch, tiny_config):
    assert requested_sharding() is None
    for variables, changed, fact in (
        (FSDP, {"FSDP_VERSION": "1"}, "fsdp_version must be 2"),
        (FSDP, {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "config.activation_checkpointing=True"),
        (FSDP, {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading must be false"),
        (ZERO3, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "stage 2"),
        (ZERO3, {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, "zero3_init_flag must be false"),
    ):
        ask(**variables | changed)
        with pytest.raises(EngineError, match=fact):
            requested_sharding()
        ask(**variables)
        for name in changed.keys() - variables.keys():
            monkeypatch.delenv(name)
    monkeypatch.setattr(loading, "check_compiler", lambda device: None)
    own = {**tiny_config().train.teachers[0], "model": tiny_config().pretrained.model, "lora_path": ""}
    for variables, fact, changes in (
        (FSDP, "train.merge_teachers", {"train__merge_teachers": True}),
        (ZERO3, "compile", {"compile": True}),
        (FSDP, "teacher_device", {"teacher_device": "cpu", "train__teachers": [own]}),
        (ZERO3, "model of its own", {"train__teachers": [own]}),
    ):
        ask(**variables)
        with pytest.raises(EngineError, match=fact), monkeypatch.context() as without:
            for name in {*FSDP, *ZERO3} - variables.keys():
                without.delenv(name, raising=False)
            loading.check_devices(check(tiny_config(**changes), 1), torch.device("cpu"))
    monkeypatch.setattr(engine, "is_deepspeed_available", lambda: False)
    with pytest.raises(EngineError, match="pip install deepspeed"):  # before accelerate, which would name no remedy
        train(tiny_config())


@pytest.mark.parametrize("name", ["fsdp2", "deepspeed_zero3"])
def test_the_configurations_for_accelerate_ask_for_it(ask, name):
    """Read as the launcher reads them, and the variables that it sets are understood."""
    file = str(ROOT / "scripts" / "accelerate" / f"{name}.yaml")
    options = ["--config_file", file, "--num_processes", "2", "--main_process_port", "0", "script.py"]
    variables = worker_environments(_validate_launch_command(launch_command_parser().parse_args(options))[0])[0]
    ask(**{key: value for key, value in variables.items() if os.environ.get(key) != value and key != "PYTHONPATH"})
    assert requested_sharding() is not None


def test_a_sharded_base_whose_samples_have_forwards_of_their_own_gets_them_one_by_one(backbone, monkeypatch):
    """Else processes that have other numbers of them would make other numbers of forwards."""
    for sharding, paddable, expected in ((None, False, 4), (object(), True, 4), (object(), False, 1)):
        monkeypatch.setattr(backbone, "sharding", sharding)
        monkeypatch.setattr(type(backbone), "PADDABLE", paddable)
        assert backbone.in_step(4) == expected


def test_processes_in_step_make_the_same_number_of_batches(monkeypatch):
    """Whatever does not divide by what, and although a scorer fails."""

    def run(calls, prompts, batch_size, rank, world, scorers, gather=list):
        monkeypatch.setattr("diffusionopd.evaluation.evaluate.gather_over_processes", gather)

        def generate(texts, samples):
            calls.append(len(texts))
            return torch.zeros(len(texts), 3, 4, 4)

        own = [Prompt(f"prompt {i}", {}) for i in range(prompts)]
        evaluate_task(generate, own, scorers, batch_size=batch_size, rank=rank, world=world, in_step=True)

    for prompts, batch_size, world in ((3, 1, 2), (5, 2, 2), (1, 4, 3), (8, 2, 2), (0, 2, 2)):
        scored, calls = [], [[] for _ in range(world)]
        for rank in range(world):
            run(calls[rank], prompts, batch_size, rank, world, {}, lambda r, scored=scored: scored.extend(r) or r)
        assert len(set(map(len, calls))) == 1, calls
        assert sorted(record.sample_id for record in scored) == list(range(prompts))

    def broken(*_):
        raise RewardError("the scorer broke")

    calls = []
    with pytest.raises(RewardError, match="the scorer broke"):
        run(calls, 5, 2, 0, 1, {"broken": SimpleNamespace(score=broken)})
    assert calls == [2, 1, 1], "the batch that failed, then as many as the others"
