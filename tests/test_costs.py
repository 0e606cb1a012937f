"""Costs counted without weights against models with weights: a FLOP counter, autograd, an allocator, real runs."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, Mask2FormerForUniversalSegmentation

from diffusionopd.models.conditions import Conditions
from diffusionopd.models.fused import fuse_norms
from diffusionopd.models.loading import BackboneError, load_text_encoder
from diffusionopd.models.lora import Adapters
from diffusionopd.models.sd3 import StableDiffusion3
from diffusionopd.rewards.geneval.convert import swin_small_config
from diffusionopd.training import check, load_config, train
from diffusionopd.training.costs import ladder
from diffusionopd.training.costs.count import Cost, count_decode, measure
from diffusionopd.training.costs.models import REWARDS, Pipeline, read_pipeline
from diffusionopd.training.costs.round import HEADROOM, memory, scorers, step_cost, work
from diffusionopd.training.keys import ema_repeats
from diffusionopd.training.loading import load_loras, load_models
from diffusionopd.training.passes import memory_lines
from tools import cost as command

from .conftest import ROOT, TARGETS
from .helpers import metrics

LENGTH, SIDE = 5, 16  # text tokens, latent positions per side: 64 image tokens
MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
SMALL = {
    "sample_size": SIDE, "patch_size": 2, "in_channels": 8, "out_channels": 8, "num_layers": 3,
    "attention_head_dim": 16, "num_attention_heads": 3, "joint_attention_dim": 40, "caption_projection_dim": 48,
    "pooled_projection_dim": 24, "pos_embed_max_size": 24, "dual_attention_layers": (), "qk_norm": None,
}  # fmt: skip
NORMALISED = SMALL | {"qk_norm": "rms_norm"}
DUAL = NORMALISED | {"dual_attention_layers": (0, 1)}
SHAPES = pytest.mark.parametrize("config", [SMALL, NORMALISED, DUAL], ids=["plain", "normalised", "dual"])


def counted(config: dict, targets=TARGETS, resolution: int = SIDE, **options) -> Cost:
    """Of an SD3 whose VAE does not reduce, and whose prompts have three tokens of CLIP and two of T5."""
    index = read_pipeline(MEDIUM).configs["index"]
    configs = {"index": index, "transformer": config, "vae": {"block_out_channels": [32]}, "scheduler": {}}
    encoders = {"text_encoder": CLIPTextConfig(max_position_embeddings=3)}
    pipeline = Pipeline("small", StableDiffusion3, configs, encoders)
    return measure(pipeline, resolution, LENGTH - 3, rank=4, targets=targets, **options)


def adapted(transformer: torch.nn.Module, rank: int = 4, targets=TARGETS) -> list[torch.nn.Parameter]:
    """The parameters of a student that the transformer now has and uses."""
    adapters = Adapters(transformer)
    adapters.add_student("student", rank=rank, alpha=8, target_modules=targets)
    adapters.use("student")
    return adapters.parameters("student")


def real(config: dict, targets: list[str] | None = None, half: bool = False) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(**config)
    transformer = transformer.requires_grad_(False).to(torch.bfloat16 if half else torch.float32)
    fuse_norms(transformer)
    if targets is not None:
        adapted(transformer, targets=targets)
    return transformer


def forward(transformer: SD3Transformer2DModel, rows: int, half: bool = False) -> torch.Tensor:
    """As the backbone calls it."""
    dtype, c = (torch.bfloat16 if half else torch.float32), transformer.config
    x = torch.randn(rows, c.in_channels, SIDE, SIDE, dtype=dtype)
    text, pooled = torch.randn(rows, LENGTH, c.joint_attention_dim), torch.randn(rows, c.pooled_projection_dim)
    time = torch.full((rows,), 500.0)
    return transformer(x, text.to(dtype), pooled.to(dtype), time, return_dict=False)[0].float()


def values(tensors) -> int:
    return sum(tensor.numel() for tensor in tensors)


def size(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class RmsNorm(torch.autograd.Function):
    """What a GPU's kernel allocates and keeps, its input and a float32 a row, with no values."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, torch.zeros(x.shape[:-1]))
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros_like(grad), None, None


@pytest.fixture
def gpu_kernels(monkeypatch):
    """Real tensors through layers that keep what a GPU's keep, once it is called."""
    stack = ExitStack()

    def use() -> None:
        monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: RmsNorm.apply(x, weight, eps))
        stack.enter_context(sdpa_kernel(SDPBackend.FLASH_ATTENTION))

    with stack:
        yield use


# ---- Parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "layers"),
    [
        ("stabilityai/stable-diffusion-3-medium-diffusers", 2_028_328_000, 191),
        pytest.param(MEDIUM, 2_243_171_520, 191, marks=pytest.mark.slow),
        ("stabilityai/stable-diffusion-3.5-large", 8_056_627_520, 303),
        ("black-forest-labs/FLUX.2-klein-4B", 3_875_544_576, 80),
        ("Tongyi-MAI/Z-Image", 6_154_908_736, 136),
    ],
)
def test_parameters_of_the_published_models(name, parameters, layers):
    transformer = read_pipeline(name).backbone(torch.bfloat16).transformer
    assert values(transformer.parameters()) == parameters
    trained = adapted(transformer, rank=32, targets=read_pipeline(name).family.LORA_TARGETS)
    assert len(trained) / 2 == layers
    if name == MEDIUM:
        cost = measure(read_pipeline(name), 64, 128, rank=32)
        assert (cost.parameters, cost.lora_parameters, cost.lora_layers) == (parameters, values(trained), layers)
        assert cost.buffers == values(transformer.buffers()) == 384**2 * 1536
        blocks = [values(p for n, p in b.named_parameters() if "lora" not in n) for b in transformer.transformer_blocks]
        assert (cost.largest_block, cost.adapted_parameters) == (max(blocks), 191 * 1536**2)
        assert (cost.latent, cost.embedding) == (16 * 8 * 8, (77 + 128) * 4096 + 2048)
        assert cost.vae_parameters == 83_819_683


def test_the_parts_beside_the_transformer(pipeline_folder):
    """CLIP ViT-L/14, ViT-bigG/14 and T5 v1.1 XXL with a shared embedding; a folder's own."""
    assert read_pipeline(MEDIUM).encoder_parameters() == 123_650_304 + 694_659_840 + 4_762_310_656
    pipeline, pipe = read_pipeline(str(pipeline_folder)), StableDiffusion3Pipeline.from_pretrained(pipeline_folder)
    encoders = (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
    assert pipeline.encoder_parameters() == sum(values(encoder.parameters()) for encoder in encoders)
    latents = torch.zeros(2, 8, SIDE, SIDE)
    decoded = count_decode(pipeline, SIDE * pipe.vae_scale_factor, 2)
    with torch.no_grad():
        assert decoded.flops == count_flops(lambda: pipe.vae.decode(latents))
        assert decoded.peak > pipe.vae.decode(latents).sample.nbytes
    with pytest.raises(BackboneError, match="owner/other"):
        read_pipeline("owner/other")


def test_conditions_are_as_large_as_those_that_the_encoders_make(pipeline_folder, backbone):
    encode = load_text_encoder(str(pipeline_folder), max_sequence_length=9)
    conditions = read_pipeline(str(pipeline_folder)).conditions(2, 9, torch.float32)
    expected = Conditions.of(encode(["a photo", "b"]))
    assert {n: p.shape for n, p in conditions.parts.items()} == {n: p.shape for n, p in expected.parts.items()}


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


def count_flops(work) -> int:
    """Torch's count of real work, with the CPU's attention kernel and products in place."""
    aten = torch.ops.aten
    mapping = {
        aten.addmm_: lambda y, h, b, **o: 2 * h[0] * h[1] * b[1],
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, **o: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *a, **o: sdpa_backward_flop_count(
            g, q, k, v
        ),
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("targets", [TARGETS, ["attn.to_q", "ff.net.2"], ["attn2.to_v", "ff_context.net.0.proj"]])
@SHAPES
def test_flops_are_those_that_torch_counts(config, targets):
    rows = 2
    if config is not DUAL and "attn2.to_v" in targets:
        targets = ["ff_context.net.0.proj"]
    cost, transformer = counted(config, targets, rows=rows, half=False), real(config, targets)
    with torch.no_grad():
        assert count_flops(lambda: forward(real(config), rows)) == rows * cost.forward
        assert count_flops(lambda: forward(transformer, rows)) == rows * (cost.forward + cost.lora_forward)
    loss = forward(transformer, rows).square().mean()
    assert count_flops(loss.backward) == rows * cost.backward


def test_checkpointing_computes_the_blocks_again():
    plain, again = counted(DUAL), counted(DUAL, checkpointing=True)
    transformer = real(DUAL, TARGETS)
    transformer.enable_gradient_checkpointing()
    assert count_flops(forward(transformer, 1).sum().backward) == again.backward
    assert 0.9 < (again.backward - plain.backward) / (plain.forward + plain.lora_forward) < 1
    assert replace(again, backward=plain.backward, kept=plain.kept, activations=plain.activations) == plain


# ---- Bytes -----------------------------------------------------------------------------------------------------------


def saved_bytes(transformer: SD3Transformer2DModel, rows: int, half: bool) -> int:
    """What autograd saves in a forward pass, each storage once, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*transformer.parameters(), *transformer.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        if (pointer := tensor.untyped_storage().data_ptr()) not in own:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        velocity = forward(transformer, rows, half)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) + velocity.nbytes


@pytest.mark.parametrize("half", [False, True])
@SHAPES
def test_kept_bytes_are_those_that_autograd_saves(gpu_kernels, config, half):
    cost = counted(config, rows=2, half=half)
    gpu_kernels()
    assert cost.kept == pytest.approx(saved_bytes(real(config, TARGETS, half), 2, half), rel=0.01)


def test_attention_keeps_what_one_kernel_keeps():
    """Queries, keys, values, result and a float32 a row and head: not a matrix of all pairs of tokens."""
    one = SMALL | {"num_layers": 1}
    kept = [counted(one, ["attn.to_q"], resolution=side, half=False).kept for side in (16, 32, 48)]
    per_token = (kept[1] - kept[0]) / (256 - 64)  # of 64, 256 and 576 tokens
    assert (kept[2] - kept[1]) / (576 - 256) == pytest.approx(per_token)
    assert per_token > 4 * (4 * 48 + 3)


def peak_bytes(work) -> int:
    """The most that torch's CPU allocator held during the work, beyond what it held before."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        work()
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = live = 0
    for change in changes:
        live += change
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("half", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_peak_of_a_step_is_what_an_allocator_sees(gpu_kernels, half, checkpointing):
    config = DUAL | {"num_layers": 6, "attention_head_dim": 32, "num_attention_heads": 4, "caption_projection_dim": 128}
    cost = counted(config, rows=2, half=half, checkpointing=checkpointing)
    transformer = real(config, TARGETS, half)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    gpu_kernels()
    forward(transformer, 2, half).sum().backward()  # what is allocated once
    seen = peak_bytes(lambda: forward(transformer, 2, half).sum().backward())
    # A CPU's products of bf16 have workspaces, which are not counted.
    assert cost.activations == pytest.approx(seen, rel=0.12 if half else 0.05)


def costs_of(config):
    plan = check(config, 1)
    return plan, step_cost(plan, read_pipeline(config.pretrained.model), plan.shape.backward_size)


def test_rows_of_memory_are_the_tensors_of_a_run(tiny_config, backbone):
    rows = memory(*costs_of(tiny_config(train__ema=True)), shards=1)
    assert rows["base transformer"] == size([*backbone.transformer.parameters(), *backbone.transformer.buffers()])
    assert rows["VAE, float32"] == size(backbone.vae.parameters())
    trained = adapted(backbone.transformer)
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert rows["student: LoRA, gradient, optimizer, EMA"] == 3 * size(trained) + size(moments)


def test_frozen_loras_count_as_they_are(tiny_config, make_lora):
    """Of other ranks and layers than the student's, references too, and merged; those not here as large as its own."""
    config = tiny_config()
    config.train.teachers[0] |= {"lora_path": str(make_lora(3, rank=16, targets=["attn.to_q", "ff.net.2"]))}
    config.train.teachers[1] |= {"strength": 1.5, "reference": str(make_lora(4, rank=1))}
    plan, cost = costs_of(config)
    loras = load_loras(plan, {})
    whole = size([matrix for lora in loras.values() for m in (lora.a, lora.b) for matrix in m.values()])
    assert len(loras) == 3 and memory(plan, cost, 1)["teachers"] == whole
    config.train.merge_teachers = True
    plan, cost = costs_of(config)
    assert memory(plan, cost, 1)["teachers"] == whole + 3 * 4 * cost.adapted_parameters
    for task in config.train.teachers:
        task["lora_path"] = "owner/name"
    config.train.teachers[1] |= {"strength": 1.0, "reference": ""}
    config.train.merge_teachers = False
    plan, cost = costs_of(config)
    assert memory(plan, cost, 1)["teachers"] == 2 * 4 * cost.lora_parameters


def test_layers_that_only_teachers_have_count_where_the_student_starts_from_them(tiny_config, make_lora):
    config = tiny_config(train__student_init="teachers")
    config.train.teachers[0]["lora_path"] = str(make_lora(3, targets=["attn.to_q", "ff.net.2"]))
    plan, cost = costs_of(config)
    _, adapters = load_models(plan, torch.device("cpu"), torch.float32, load_loras(plan, {}))
    assert cost.lora_parameters == values(adapters.parameters("student"))
    assert cost.lora_layers > costs_of(tiny_config())[1].lora_layers


# ---- Rounds ----------------------------------------------------------------------------------------------------------

ALGORITHMS = {
    "opd": {"train__cfg": True, "sample__guidance_scale": 2.0, "train__beta": 0.1},
    "opd, two passes": {"train__num_inner_epochs": 2},
    "sft": {"train__algorithm": "sft"},
    "nft": {"train__algorithm": "nft", "sample__num_image_per_prompt": 2, "train__beta": 0.1},
    "grpo": {"train__algorithm": "grpo", "sample__num_image_per_prompt": 2, "sample__noise_level": 0.7},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_nfe_is_what_a_run_counts(tiny_config, tmp_path, name):
    """Announced by its plan, and by the prediction of its cost."""
    config = tiny_config(num_epochs=1, **ALGORITHMS[name])
    plan, cost = check(config, 1), counted(SMALL | {"num_layers": 1}, targets=["attn.to_q"])
    train(config)
    nfe, seen = plan.nfe_per_round, metrics(tmp_path / "logs" / "run")[0]["evaluations"]
    assert seen == nfe.student + nfe.teacher + nfe.sampling + nfe.base
    assert seen == sum(evaluations for evaluations, _ in work(plan, cost).values())
    assert (memory(plan, cost, 1).get("other frozen adapters", 0) > 0) == (name == "nft")


def flops_of(plan, cost) -> int:
    return sum(flops for _, flops in work(plan, cost).values())


def test_a_published_round():
    """10 steps, 9 trained, guidance everywhere."""
    config = load_config(f"{ROOT}/config/opd.py:sopd_ocr")
    plan, cost = check(config, 8, sources=False), counted(DUAL | {"num_layers": 6})
    assert flops_of(plan, cost) == 72 * 2 * 9 * (2 * (cost.forward + cost.lora_forward) + cost.backward)
    config.train.merge_teachers = True
    merged = check(config, 8, sources=False)
    assert flops_of(merged, cost) == flops_of(plan, cost) - 72 * 2 * 9 * cost.lora_forward
    peak, sharded = (sum(memory(plan, cost, shards).values()) for shards in (1, 8))
    assert sharded < peak < sum(memory(merged, cost, 1).values())
    config.mixed_precision = "no"
    frozen = [memory(each, cost, 1)["base transformer"] for each in (plan, check(config, 8, sources=False))]
    assert frozen == [2 * (cost.parameters + cost.buffers), 4 * (cost.parameters + cost.buffers)]


# ---- The ladder ------------------------------------------------------------------------------------------------------

ONE_GPU = pytest.mark.parametrize("size", [24, 40, 80])


def test_rungs_are_smaller_passes_of_the_same_round(tiny_config, monkeypatch):
    """Each is counted as its configuration is, and a GPU that it just fits into is offered that configuration."""
    options = {"train__ema": True, "train__ema_repeats": 0, "mixed_precision": "bf16"}
    plan, pipeline = check(tiny_config(**options), 1), read_pipeline(tiny_config().pretrained.model)
    counted_once = functools.cache(lambda again: step_cost(with_checkpointing(plan, again), pipeline, 2))
    monkeypatch.setattr(ladder, "step_cost", lambda plan, *_: counted_once(plan.values["activation_checkpointing"]))
    found = list(ladder.rungs(plan, pipeline))
    passes = [(2, 2), (1, 2), (1, 1)]
    assert [(r.tasks, r.batch_size, r.checkpointing) for r in found] == [(*p, c) for c in (False, True) for p in passes]
    for rung in found:
        config = tiny_config(**options, train__tasks_per_pass=rung.tasks)
        config.update_from_flattened_dict(ladder.changed(plan, rung))
        its = check(config, 1)
        assert (its.shape.images_per_task, ema_repeats(its.values)) == (plan.shape.images_per_task, 2)
        assert its.shape.backward_batches == its.shape.batches_per_step, "one optimizer step"
        if rung == found[-1]:
            assert sum(memory(its, step_cost(its, pipeline, 1), 1).values()) == pytest.approx(rung.size, rel=0.02)
        room = rung.size / HEADROOM + 1
        first = next(other for other in found if other.fits(room))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, room=room: (room, room))
        line = memory_lines(plan, torch.device("cuda"))[1]
        assert all(f"--config.{name}={value}" in line for name, value in ladder.changed(plan, first).items())
    assert len(memory_lines(plan, torch.device("cpu"))) == 1 + len(ladder.GPUS)
    uneven = SimpleNamespace(tasks_per_pass=3, tasks_per_round=4, backward_size=1)
    assert list(ladder._passes(uneven)) == [(3, 1), (2, 1), (1, 1)], "what is configured comes first"
    assert memory_lines(check(tiny_config(), 1), torch.device("cpu")) == [], "a run for this CPU"


def with_checkpointing(plan, again: bool):
    return replace(plan, values={**plan.values, "activation_checkpointing": again})


@ONE_GPU
def test_one_gpu_has_the_published_round(size):
    published = check(load_config(f"{ROOT}/config/opd.py:mopd"), 8, sources=False)
    own = check(load_config(f"{ROOT}/config/opd.py:mopd_{size}gb"), 1, sources=False)
    for counted_ in (
        lambda plan: (plan.shape.images_per_task, plan.shape.groups_per_task, plan.shape.num_tasks),
        lambda plan: (plan.shape.backward_batches // plan.shape.batches_per_step, plan.shape.rounds_per_step),
        lambda plan: (plan.nfe_per_round, plan.sampler, ema_repeats(plan.values), plan.tasks),
    ):
        assert counted_(own) == counted_(published)
    sizes = {name for name in published.values if own.values[name] != published.values[name]}
    assert sizes <= {
        "run_name", "reward_options", "sample.train_batch_size", "train.batch_size", "sample.num_batches_per_epoch",
        "train.gradient_accumulation_steps", "train.ema_repeats",
    }  # fmt: skip


@pytest.mark.slow
@ONE_GPU
def test_one_gpu_holds_its_rounds(size):
    """With the passes that its preset has, and with room left for what is not counted."""
    config = load_config(f"{ROOT}/config/opd.py:mopd_{size}gb")
    plan = check(config, 1, sources=False)
    for rung in ladder.rungs(plan, read_pipeline(MEDIUM)):
        if rung.fits(ladder.GPUS[f"{size} GB"]):
            break
    assert not set(ladder.changed(plan, rung)), "its batch, without checkpointing"


def test_models_of_rewards_are_counted_once(tiny_config):
    """CLIP ViT-L/14 of two, on the training device, in their type."""
    with torch.device("meta"):
        detector = Mask2FormerForUniversalSegmentation(swin_small_config())
        sizes = {"mask2former": values(detector.parameters()), "clip_l": values(clip(768, 1024, 12, 24).parameters())}
        assert REWARDS["pickscore"]["parameters"] == {"pickscore": values(clip(1024, 1280, 24, 32).parameters())}
    assert REWARDS["geneval"]["parameters"] == sizes
    weights = {"geneval": 1.0, "clipscore": 1.0, "jpeg_compressibility": 1.0}
    options = {"train__teachers": [dict(task, proxy_reward=weights) for task in tiny_config().train.teachers]}
    plans = [
        check(tiny_config(**options, **more), 1, sources=False)
        for more in (
            {"monitor_freq": 1},
            {"monitor_freq": 1, "reward_options": {"geneval": {"device": "cpu"}, "clipscore": {"dtype": "float16"}}},
            {"monitor_freq": 0, "eval_freq": 0},
        )
    ]
    assert [scorers(plan) for plan in plans] == [4 * sum(sizes.values()), 2 * sizes["clip_l"], 0]


def clip(text: int, vision: int, text_layers: int, vision_layers: int) -> CLIPModel:
    """Of published sizes: heads of 64 and 80 values, four times as wide in between."""
    sides = [
        {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": 16}
        for width, layers in ((text, text_layers), (vision, vision_layers))
    ]
    vision_config = sides[1] | {"patch_size": 14}
    return CLIPModel(CLIPConfig(text_config=sides[0], vision_config=vision_config, projection_dim=text))


# ---- The command -----------------------------------------------------------------------------------------------------


def test_every_shipped_configuration_has_a_cost(monkeypatch, capsys, tiny_config):
    cost = costs_of(tiny_config())[1]  # the same for all: what a step costs is tested above
    monkeypatch.setattr(command, "step_cost", lambda *_: cost)
    monkeypatch.setattr(command, "outside_training", lambda *_: {})
    monkeypatch.setattr(ladder, "step_cost", lambda *_: cost)
    monkeypatch.chdir(ROOT)
    names = ("opd", "teacher", "tiny", "flux1", "flux2", "z_image", "sana")
    files = {file: (ROOT / f"config/{file}.py").read_text() for file in names}
    presets = [(file, name) for file, text in files.items() for name in re.findall(r"^def ([a-z]\w+)\(\)", text, re.M)]
    assert len(presets) > 12
    for file, name in presets:
        monkeypatch.setattr(sys, "argv", f"cost.py --config config/{file}.py:{name} --num_processes 8".split())
        command.main()
        printed = capsys.readouterr().out
        assert "peak of a training step" in printed and "NFE" in printed, name
        # Prompts that differ in length, or few rounds: blocks are not compiled.
        uncompiled = file in ("z_image", "sana", "tiny") or name.startswith("tiny_")
        assert ("33% of 790 TFLOP/s per GPU, not" if uncompiled else "47% of 790 TFLOP/s per GPU, c") in printed, name


@pytest.mark.slow
def test_the_command_from_anywhere_writes_the_figures_of_the_guide(tmp_path):
    file = tmp_path / "figures.json"
    arguments = [sys.executable, str(ROOT / "tools/cost.py"), "--config", f"{ROOT}/config/opd.py:mopd"]
    done = subprocess.run(
        [*arguments, "--config.train.tasks_per_pass=1", "--num_processes", "8", "--json", str(file)],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert figures["evaluations"] == 72 * 9 * 2 + 24 * 9 * 5
    table = [line.split(" | ") for line in (ROOT / "docs" / "scaling.md").read_text("utf-8").splitlines()]
    (row,) = [cells for cells in table if cells[:2] == ["| SD3.5-medium", "512"] and cells[3] == "3"]
    peaks = [figures["memory_bytes"][way]["peak"] / 1e9 for way in ("replicated", "sharded")]
    assert [float(row[4]), float(row[6])] == pytest.approx(peaks, abs=0.005)
