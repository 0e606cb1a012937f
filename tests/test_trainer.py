"""Whole runs: equal however they are cut into processes, batches and sittings; nothing saved is ever lost."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusionopd.algorithms.opd import STUDENT
from diffusionopd.algorithms.optim import NonFiniteError
from diffusionopd.models.lora_files import AdapterError
from diffusionopd.training import RunError, Trainer, checkpoint, train

from .conftest import ROOT


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def student(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in checkpoint.load_state(folder / "state")[0].items() if k.startswith("student.")}


def assert_bitwise(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_writes_what_it_promises(tiny_config, tmp_path):
    config = tiny_config(num_epochs=3, save_freq=2, monitor_freq=2, sample_freq=3, eval_freq=3, eval_num_prompts=2)
    last = train(config)
    run = tmp_path / "logs" / "run"
    assert last == run / "checkpoints" / "checkpoint-3"
    assert (run / "checkpoints" / "latest").read_text().strip() == "checkpoint-3"
    rows = metrics(run)
    assert [row["round"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert {"loss", "loss/first", "loss/second", "grad_norm", "lr", "seconds"} <= row.keys()
        assert row["loss"] == pytest.approx((row["loss/first"] + row["loss/second"]) / 2)
        assert 0 < row["loss"] < 1e3
        assert row["grad_norm"] > 0
    assert all("monitor/first/jpeg_compressibility" in rows[i] for i in (0, 1, 2)), "first, every second, last"
    assert "eval/second/jpeg_compressibility" in rows[2]
    assert "eval/second/jpeg_compressibility" not in rows[1]
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["round-000001.png", "round-000003.png"]
    assert json.loads((run / "config.json").read_text())["train"]["lora_rank"] == 4
    for name in ("checkpoint-2", "checkpoint-3"):
        checkpoint.verify(run / "checkpoints" / name)
        assert (run / "checkpoints" / name / "lora" / "adapter_config.json").is_file()
        assert (run / "checkpoints" / name / "diffusers" / "pytorch_lora_weights.safetensors").is_file()


def test_the_saved_lora_is_the_average_and_the_state_is_the_student(tiny_config):
    last = train(tiny_config(train__ema=True, train__ema_interval=1))
    tensors, _ = checkpoint.load_state(last / "state")
    saved = list(load_file(last / "lora" / "adapter_model.safetensors").values())
    ema = [t for k, t in tensors.items() if k.startswith("ema.")]
    by_sum = sorted(t.double().sum().item() for t in saved)
    assert by_sum == pytest.approx(sorted(t.double().sum().item() for t in ema))
    assert any(
        not torch.equal(tensors[k], tensors[k.replace("student", "ema")]) for k in tensors if k.startswith("student.")
    )


def test_base_and_teachers_are_bitwise_unchanged(tiny_config, tmp_path):
    from accelerate import Accelerator

    from diffusionopd.config_schema import check

    config = tiny_config()
    trainer = Trainer(config, check(config, 1), Accelerator(cpu=True))
    before = {n: p.detach().clone() for n, p in trainer.backbone.transformer.named_parameters()}
    before |= {n: p.detach().clone() for n, p in trainer.backbone.vae.named_parameters()}
    trainer.run()
    trainer.close()
    changed = set()
    for name, parameter in [*trainer.backbone.transformer.named_parameters(), *trainer.backbone.vae.named_parameters()]:
        if not torch.equal(parameter, before[name]):
            changed.add(name)
    assert changed
    assert all(f".{STUDENT}." in name for name in changed)


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
def test_interrupted_and_resumed_equals_uninterrupted_bitwise(tiny_config, tmp_path, noise_level):
    options = {"sample__noise_level": noise_level, "train__ema": True, "train__ema_interval": 2}
    whole = train(tiny_config(num_epochs=5, run_name="whole", **options))
    part = train(tiny_config(num_epochs=2, run_name="parts", **options))
    # What a crash may leave: metrics of rounds after the checkpoint, and a line cut short.
    file = tmp_path / "logs" / "parts" / "metrics.jsonl"
    file.write_text(file.read_text() + '{"round": 3, "loss": 9}\n{"round": 4, "lo')
    resumed = train(tiny_config(num_epochs=5, run_name="parts", resume_from="auto", **options))
    assert part.name == "checkpoint-2"
    assert_bitwise(checkpoint.load_state(whole / "state")[0], checkpoint.load_state(resumed / "state")[0])
    assert_bitwise(
        load_file(whole / "lora/adapter_model.safetensors"), load_file(resumed / "lora/adapter_model.safetensors")
    )
    keys = ("round", "loss", "loss/first", "loss/second", "grad_norm")
    rows = [[{k: row[k] for k in keys} for row in metrics(tmp_path / "logs" / name)] for name in ("whole", "parts")]
    assert rows[0] == rows[1]


def test_resuming_a_finished_run_changes_nothing(tiny_config):
    first = train(tiny_config())
    before = student(first)
    assert train(tiny_config(resume_from="auto")) == first
    assert_bitwise(before, student(first))


def test_a_fresh_start_does_not_touch_an_existing_run(tiny_config):
    first = train(tiny_config())
    before = student(first)
    with pytest.raises(RunError, match="already holds a run with checkpoint-3.*resume_from=auto"):
        train(tiny_config())
    assert_bitwise(before, student(first))


def test_resume_from_a_path_or_a_damaged_checkpoint(tiny_config, tmp_path):
    train(tiny_config(num_epochs=2, save_freq=1))
    root = tmp_path / "logs" / "run" / "checkpoints"
    other = train(tiny_config(num_epochs=3, run_name="other", resume_from=str(root / "checkpoint-1")))
    assert other == tmp_path / "logs" / "other" / "checkpoints" / "checkpoint-3"
    assert metrics(tmp_path / "logs" / "other")[0]["round"] == 2
    tensors = root / "checkpoint-2" / "state" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    with pytest.raises(checkpoint.CheckpointError, match="bytes instead of"):
        train(tiny_config(num_epochs=3, resume_from=str(root / "checkpoint-2"), run_name="third"))
    with pytest.warns(UserWarning, match="checkpoint-2 is damaged"):
        resumed = train(tiny_config(num_epochs=3, resume_from="auto"))
    assert_bitwise(student(resumed), student(other))


def test_student_of_another_rank_is_not_resumed(tiny_config):
    train(tiny_config(num_epochs=1))
    with pytest.raises(RunError, match="another rank"):
        train(tiny_config(num_epochs=2, resume_from="auto", train__lora_rank=8), allow_config_change=True)


def test_smaller_backward_batches_train_the_same_student(tiny_config):
    a = train(tiny_config(run_name="a"))
    b = train(tiny_config(run_name="b", train__batch_size=1, train__gradient_accumulation_steps=4))
    for name, tensor in student(a).items():
        torch.testing.assert_close(tensor, student(b)[name], rtol=1e-4, atol=2e-5)


def test_a_student_can_start_from_a_lora(tiny_config, make_lora):
    lora = make_lora(31, rank=4, alpha=8)
    last = train(tiny_config(num_epochs=1, train__lora_path=str(lora), train__learning_rate=1e-9))
    start, end = load_file(lora / "adapter_model.safetensors"), load_file(last / "lora" / "adapter_model.safetensors")
    assert start.keys() == end.keys()
    for name in start:
        torch.testing.assert_close(start[name], end[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": "bf16"},
        {"activation_checkpointing": True},
        {"sample__solver": "dpm2"},
        {"sample__solver": "cps", "sample__noise_level": 0.5},
        {"train__target": "x0", "train__self_normalize": True},
        {"train__loss": "policy_gradient", "sample__noise_level": 0.7},
        {"train__cfg": True, "sample__guidance_scale": 2.0},
        {"train__num_inner_epochs": 2},
        {"sample__num_image_per_prompt": 2, "sample__same_latent": True},
        {"log_with": "tensorboard"},
    ],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()),
)
def test_every_setting_runs(tiny_config, tmp_path, options):
    last = train(tiny_config(num_epochs=1, **options))
    checkpoint.verify(last)
    assert metrics(tmp_path / "logs" / "run")[0]["loss"] != 0
    assert (tmp_path / "logs" / "run" / "trackers").exists() == ("log_with" in options)


def test_checkpointing_activations_changes_nothing(tiny_config):
    a = train(tiny_config(run_name="a", num_epochs=2))
    b = train(tiny_config(run_name="b", num_epochs=2, activation_checkpointing=True))
    for name, tensor in student(a).items():
        torch.testing.assert_close(tensor, student(b)[name], rtol=1e-5, atol=1e-6)


def assert_equal_rounds(a: dict, b: dict) -> None:
    """Rows of ``metrics.jsonl`` of one run on different numbers of processes: equal but for the order of sums.

    A JPEG file has a whole number of bytes, and a colour on the other side of a rounding moves it by several: means of
    four files, in kB, were up to 0.002 apart; the mean of one process alone was 0.02 from that of all.
    """
    assert a.keys() == b.keys()
    for key in a.keys() - {"seconds"}:
        jpeg = key.startswith("monitor/") and key.endswith("/jpeg_compressibility")
        expected = pytest.approx(b[key], rel=0, abs=0.008) if jpeg else pytest.approx(b[key], rel=2e-4)
        assert a[key] == expected, (a["round"], key)


def test_one_process_equals_two(tiny_config, tmp_path):
    """Five rounds with batch 4 in one process and batch 2 in each of two (gloo) processes."""
    common = {"num_epochs": 5, "sample__noise_level": 0.7, "monitor_freq": 2}
    one = train(tiny_config(run_name="one", sample__train_batch_size=4, train__batch_size=4, **common))
    config = tiny_config(run_name="two", **common)
    script = tmp_path / "run.py"
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    script.write_text(
        "import json\nfrom ml_collections import ConfigDict\nfrom diffusionopd.training import train\n"
        f"train(ConfigDict(json.load(open({str(tmp_path / 'config.json')!r}))))\n"
    )
    launch(script)
    two = tmp_path / "logs" / "two" / "checkpoints" / "checkpoint-5"
    rows = [metrics(tmp_path / "logs" / name) for name in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        assert_equal_rounds(a, b)
    for name, tensor in student(one).items():
        torch.testing.assert_close(tensor, student(two)[name], rtol=1e-3, atol=5e-5)
    unreached = "base_model.model.transformer_blocks.3.attn.add_q_proj.lora_A.weight"
    loras = [load_file(folder / "lora" / "adapter_model.safetensors") for folder in (one, two)]
    assert torch.equal(loras[0][unreached], loras[1][unreached]), "no gradient in one process and in two"


def launch(script: Path, processes: int = 2) -> None:
    """`script` under torch's launcher with gloo processes of one thread each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    done = subprocess.run(
        [*command, str(script)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_complete_text_cache_never_loads_an_encoder(tiny_config, monkeypatch):
    train(tiny_config(run_name="a", num_epochs=1))
    monkeypatch.setattr(
        "diffusionopd.training.setup.load_text_encoder", lambda *a, **k: pytest.fail("an encoder was loaded")
    )
    assert train(tiny_config(run_name="b", num_epochs=1)) is not None


def test_non_finite_teacher_stops_the_run_and_keeps_the_checkpoint(tiny_config, monkeypatch, tmp_path):
    from diffusionopd.models.backbone import Backbone

    first = train(tiny_config(num_epochs=1))
    original = Backbone.velocity
    monkeypatch.setattr(Backbone, "velocity", lambda *a, **k: tuple(v * float("nan") for v in original(*a, **k)))
    with pytest.raises(NonFiniteError, match=r"round 2: the loss is nan for task 'first' at step 0 \(sigma 1.0000\)"):
        train(tiny_config(num_epochs=2, resume_from="auto"))
    checkpoint.verify(first)
    assert checkpoint.find_latest(tmp_path / "logs" / "run" / "checkpoints") == first


def test_a_broken_teacher_stops_before_training(tiny_config, tmp_path):
    config = tiny_config()
    file = Path(config.train.teachers[1]["lora_path"]) / "adapter_model.safetensors"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(AdapterError, match="truncated"):
            train(config)
    finally:
        file.write_bytes(whole)
    assert not (tmp_path / "logs" / "run" / "checkpoints").exists()


def test_a_failing_monitor_does_not_stop_training(tiny_config, tmp_path, monkeypatch):
    from diffusionopd.rewards.jpeg import JpegCompressibility

    def fail(self, *args):
        raise RuntimeError("scorer broke")

    monkeypatch.setattr(JpegCompressibility, "score", fail)
    with pytest.warns(UserWarning, match="training goes on.*scorer broke"):
        train(tiny_config(monitor_freq=1, num_epochs=2))
    assert len(metrics(tmp_path / "logs" / "run")) == 2


def test_a_full_disk_at_a_checkpoint_keeps_the_previous_one(tiny_config, tmp_path, monkeypatch):
    first = train(tiny_config(num_epochs=1))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_state", full)
    with pytest.raises(checkpoint.CheckpointError, match="No space left.*checkpoints are untouched"):
        train(tiny_config(num_epochs=2, resume_from="auto"))
    monkeypatch.undo()
    checkpoint.verify(first)
    assert train(tiny_config(num_epochs=2, resume_from="auto")).name == "checkpoint-2"


def test_dry_run_loads_and_writes_nothing(tiny_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffusionopd.training.setup.load_backbone", lambda *a, **k: pytest.fail("weights were loaded"))
    assert train(tiny_config(), dry_run=True) is None
    assert "dry run" in capsys.readouterr().out
    assert not (tmp_path / "logs" / "run").exists()
