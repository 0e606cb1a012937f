"""A base that is sharded over processes trains the same student as a whole one, and is resumed as one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from ml_collections import ConfigDict

from diffusionopd.data.prompts import Prompt
from diffusionopd.evaluation.evaluate import evaluate_task
from diffusionopd.launch import worker_environments
from diffusionopd.models import sharding as engine
from diffusionopd.models.sharding import EngineError, requested_sharding
from diffusionopd.rewards import RewardError
from diffusionopd.training import train
from diffusionopd.training.setup import Run

from .conftest import ROOT
from .forked import fork
from .helpers import assert_bitwise, metrics, state

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
}
ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
}


def train_sharded(folder: Path, environment: dict[str, str], config: ConfigDict) -> int:
    """Train in two processes; how many values of the base the first one held at the end."""

    def run(rank: int) -> None:
        original = Run.close

        def close(run: Run) -> None:
            base = {n: p for n, p in run.backbone.transformer.named_parameters() if ".lora_" not in n}
            shares = [getattr(p, "ds_tensor", p.to_local() if hasattr(p, "to_local") else p) for p in base.values()]
            loras = [p for name in run.adapters.configs for p in run.adapters.parameters(name)]
            assert all(type(p) is torch.nn.Parameter and p.numel() > 0 for p in loras), "LoRAs stay whole"
            if rank == 0:
                (folder / "held").write_text(str(sum(share.numel() for share in shares)))
            original(run)

        Run.close = close
        train(config)

    fork(run, 2, environment=environment)
    return int((folder / "held").read_text())


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        if name.startswith(("student", "ema", "old")):
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=5e-5)


def assert_same_rounds(a: list[dict], b: list[dict]) -> None:
    assert [row["round"] for row in a] == [row["round"] for row in b]
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x.keys() - {"seconds"} - {key for key in x if key.startswith(("time/", "memory/"))}:
            assert x[key] == pytest.approx(y[key], rel=2e-3, abs=1e-9), (x["round"], key)


@pytest.mark.slow
def test_sharded_training_is_that_of_one_process_and_resumes_either_way(tiny_config, tmp_path):
    """Two teachers, guidance, noise, EMA, and an evaluation whose three prompts do not divide by two processes."""
    common = {"sample__noise_level": 0.7, "train__cfg": True, "sample__guidance_scale": 2.0}
    common |= {"train__ema": True, "train__ema_interval": 1, "num_epochs": 2, "save_freq": 1, "eval_freq": 2}
    one = common | {"sample__train_batch_size": 4, "train__batch_size": 4}
    half = {"num_epochs": 1, "mixed_precision": "bf16", "activation_checkpointing": True}
    # NFT adds its old policy to a base that is sharded already.
    nft = {"train__algorithm": "nft", "sample__num_image_per_prompt": 2, "num_epochs": 1}
    rewarded = train(tiny_config(run_name="nft", sample__train_batch_size=4, train__batch_size=4, **nft))
    whole = train(tiny_config(run_name="whole", **one))
    logs = tmp_path / "logs"
    from_one = str(logs / "whole" / "checkpoints" / "checkpoint-1")
    runs = (
        (FSDP, tiny_config(run_name="sharded", **common)),
        (FSDP, tiny_config(run_name="from-one", resume_from=from_one, **common)),
        (FSDP, tiny_config(run_name="half-sharded", **half)),
        ({}, tiny_config(run_name="half-whole", **half)),
        (FSDP, tiny_config(run_name="nft-sharded", **nft)),
    )
    held = [train_sharded(tmp_path, *run) for run in runs]
    assert held[0] < 0.6 * held[3]  # half, and the few layers outside the blocks whole between steps
    sharded = logs / "sharded" / "checkpoints"
    assert_same_rounds(metrics(logs / "whole"), metrics(logs / "sharded"))
    assert "eval/first/jpeg_compressibility" in metrics(logs / "sharded")[-1]
    assert_close(state(whole), state(sharded / "checkpoint-2"))
    assert_close(state(whole), state(logs / "from-one" / "checkpoints" / "checkpoint-2"))
    continued = train(tiny_config(run_name="to-one", resume_from=str(sharded / "checkpoint-1"), **one))
    assert_close(state(whole), state(continued))
    assert any(name.startswith("old.") for name in state(rewarded))
    assert_close(state(rewarded), state(logs / "nft-sharded" / "checkpoints" / "checkpoint-1"))
    # Half precision base, float32 LoRAs and recomputed blocks, against two processes with a whole base each.
    assert_bitwise(*(state(logs / name / "checkpoints" / "checkpoint-1") for name in ("half-sharded", "half-whole")))


@pytest.mark.slow
@pytest.mark.skipif(not engine.is_deepspeed_available(), reason="needs deepspeed")
def test_zero3_trains_the_same_student(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    guided = {"train__cfg": True, "sample__guidance_scale": 2.0, "eval_freq": 2, "num_epochs": 2}
    nft = {"train__algorithm": "nft", "sample__num_image_per_prompt": 2, "num_epochs": 1}
    runs = [("opd", guided), ("nft", nft)]
    both = [
        (environment, tiny_config(run_name=f"{name}-{kind}", **options))
        for name, options in runs
        for kind, environment in (("sharded", ZERO3), ("whole", {}))
    ]
    held = [train_sharded(tmp_path, *run) for run in both]
    assert held[0] < 0.6 * held[1]
    for name, options in runs:
        sharded, whole = (tmp_path / "logs" / f"{name}-{kind}" for kind in ("sharded", "whole"))
        assert_same_rounds(metrics(whole), metrics(sharded))
        last = f"checkpoints/checkpoint-{options['num_epochs']}"
        assert_close(state(whole / last), state(sharded / last))


# ---- what is asked for ----------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """`asked(NAME=value, ...)`: these variables are in the environment."""

    def set_all(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    monkeypatch.setattr(engine, "is_deepspeed_available", lambda: True)
    return set_all


def test_without_an_engine_the_base_is_whole():
    assert requested_sharding() is None


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (FSDP | {"FSDP_VERSION": "1"}, "fsdp_version must be 2"),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "config.activation_checkpointing=True"),
        (FSDP | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading must be false"),
        (ZERO3 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "ZeRO stage 2 shards gradients and optimizer state"),
        (ZERO3 | {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, "zero3_init_flag must be false"),
    ],
)
def test_what_cannot_be_run_as_it_says_is_refused(asked, variables, message):
    asked(**variables)
    with pytest.raises(EngineError, match=message):
        requested_sharding()


def test_a_missing_deepspeed_is_said_before_accelerate_starts(asked, monkeypatch, tiny_config):
    asked(**ZERO3)
    monkeypatch.setattr(engine, "is_deepspeed_available", lambda: False)
    with pytest.raises(EngineError, match="pip install deepspeed"):
        train(tiny_config())


def test_merged_teachers_need_a_whole_base(asked, tiny_config):
    asked(**FSDP)
    with pytest.raises(EngineError, match="train.merge_teachers needs a whole base"):
        train(tiny_config(train__merge_teachers=True), dry_run=True)


def test_compiled_blocks_do_not_go_with_deepspeed(asked, tiny_config):
    asked(**ZERO3)
    with pytest.raises(EngineError, match="compile does not go with DeepSpeed"):
        train(tiny_config(compile=True), dry_run=True)


@pytest.mark.parametrize("name", ["fsdp2", "deepspeed_zero3"])
def test_the_configurations_for_accelerate_ask_for_it(asked, name):
    """Read as the launcher reads them, and the variables that it sets are understood."""
    file = str(ROOT / "scripts" / "accelerate" / f"{name}.yaml")
    options = ["--config_file", file, "--num_processes", "2", "--main_process_port", "0", "script.py"]
    variables = worker_environments(_validate_launch_command(launch_command_parser().parse_args(options))[0])[0]
    asked(**{key: value for key, value in variables.items() if os.environ.get(key) != value and key != "PYTHONPATH"})
    assert requested_sharding() is not None


@pytest.mark.parametrize(("prompts", "batch_size", "world"), [(3, 1, 2), (5, 2, 2), (1, 4, 3), (8, 2, 2), (0, 2, 2)])
def test_processes_in_step_make_the_same_number_of_batches(prompts, batch_size, world):
    calls, scored = [], []
    for rank in range(world):

        def generate(texts, samples):
            calls[-1] += 1
            return torch.zeros(len(texts), 3, 4, 4)

        calls.append(0)
        evaluate_task(
            generate,
            [Prompt(f"prompt {i}", {}) for i in range(prompts)],
            {},
            batch_size=batch_size,
            rank=rank,
            world=world,
            in_step=True,
            gather=lambda records: scored.extend(records) or records,
        )
    assert len(set(calls)) == 1, calls
    assert sorted(record.sample_id for record in scored) == list(range(prompts))


def test_a_process_whose_scorer_fails_stays_in_step():
    calls = []

    class Broken:
        def score(self, images, prompts, metadata):
            raise RewardError("the scorer broke")

    def generate(texts, samples):
        calls.append(len(texts))
        return torch.zeros(len(texts), 3, 4, 4)

    prompts = [Prompt(f"prompt {i}", {}) for i in range(5)]
    with pytest.raises(RewardError, match="the scorer broke"):
        evaluate_task(generate, prompts, {"broken": Broken()}, batch_size=2, in_step=True)
    assert calls == [2, 1, 1], "the batch that failed, then as many as the others make"
