"""The cost formulas against what they count: torch's own FLOP counter, autograd's saved tensors, real runs."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks import cost as script
from diffusionopd.config_schema import ConfigError, check, load_config
from diffusionopd.models.lora import Adapters
from diffusionopd.training import Trainer, train
from tools.costs import Lora, TransformerShape, measure, read_pipeline
from tools.costs.architecture import PUBLISHED, ArchitectureError
from tools.costs.encoders import (
    clip_flops,
    clip_parameters,
    decoder_flops,
    t5_flops,
    t5_parameters,
    vae_parameters,
)

from .conftest import ROOT, TARGETS
from .test_trainer import metrics

LORA = Lora(4, tuple(TARGETS))
LENGTH, SIDE = 5, 16  # text tokens, latent positions a side: 64 image tokens
SHAPES = {
    "plain": {"dual_attention_layers": (), "qk_norm": None},
    "normalised": {"dual_attention_layers": (), "qk_norm": "rms_norm"},
    "dual": {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
}


def small(**changes) -> dict:
    return {
        "sample_size": SIDE,
        "patch_size": 2,
        "in_channels": 8,
        "out_channels": 8,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 40,
        "caption_projection_dim": 48,
        "pooled_projection_dim": 24,
        "pos_embed_max_size": 24,
    } | changes


def build(config: dict, targets: list[str] | None = None, half: bool = False) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(**config)
    if half:
        transformer = transformer.to(torch.bfloat16)
    adapters = Adapters(transformer)
    if targets is not None:
        adapters.add_student("student", rank=4, alpha=8, target_modules=targets)
        adapters.use("student")
    return transformer


def forward(transformer: SD3Transformer2DModel, rows: int, half: bool = False) -> torch.Tensor:
    """As the backbone calls it; ``half`` under autocast with the one rule in which a GPU's differs from a CPU's."""
    dtype, c = (torch.bfloat16 if half else torch.float32), transformer.config
    x = torch.randn(rows, c.in_channels, SIDE, SIDE, dtype=dtype)
    text, pooled = torch.randn(rows, LENGTH, c.joint_attention_dim), torch.randn(rows, c.pooled_projection_dim)
    with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
        time = torch.full((rows,), 500.0)
        return transformer(x, text.to(dtype), pooled.to(dtype), time, return_dict=False)[0]


def layer_norm_as_on_a_gpu(monkeypatch) -> None:
    plain = F.layer_norm
    monkeypatch.setattr(F, "layer_norm", lambda x, *rest, **options: plain(x.float(), *rest, **options))


def formula(config: dict, lora: Lora | None = LORA, half: bool = False):
    return measure(TransformerShape.from_config(config), (SIDE // 2) ** 2, LENGTH, lora, half)


# ---- Parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "layers"),
    [
        ("stabilityai/stable-diffusion-3-medium-diffusers", 2_028_328_000, 191),
        ("stabilityai/stable-diffusion-3.5-medium", 2_243_171_520, 191),
        ("stabilityai/stable-diffusion-3.5-large", 8_056_627_520, 303),
    ],
)
def test_parameters_of_the_published_models_at_full_size(name, parameters, layers):
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**PUBLISHED[name])
        count = sum(p.numel() for p in transformer.parameters())
        adapters = Adapters(transformer)
        adapters.add_student("student", rank=32, alpha=64, target_modules=TARGETS)
    cost = measure(TransformerShape.from_config(PUBLISHED[name]), 1024, 205, Lora(32, tuple(TARGETS)), True)
    assert cost.parameters == count == parameters
    assert cost.buffers == sum(b.numel() for b in transformer.buffers())
    assert cost.lora_layers == len(adapters.parameters("student")) / 2 == layers
    assert cost.lora_parameters == sum(p.numel() for p in adapters.parameters("student"))
    blocks = [
        sum(p.numel() for n, p in b.named_parameters() if "lora" not in n) for b in transformer.transformer_blocks
    ]
    assert cost.largest_block == max(blocks)


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


def count_flops(work) -> int:
    """Torch's count, to which the CPU's attention kernel is shown as what it is."""
    aten = torch.ops.aten

    def attention(q, k, v, *rest, out_shape=None, **options):
        return sdpa_flop_count(q, k, v)

    def attention_backward(grad, q, k, v, *rest, out_shape=None, **options):
        return sdpa_backward_flop_count(grad, q, k, v)

    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("targets", [TARGETS, ["attn.to_q", "ff.net.2"], ["attn2.to_v", "ff_context.net.0.proj"]])
@pytest.mark.parametrize("shape", SHAPES)
def test_flops_are_those_that_torch_counts(shape, targets):
    config = small(**SHAPES[shape])
    lora = Lora(4, tuple(targets))
    if shape != "dual" and "attn2.to_v" in targets:
        targets = ["ff_context.net.0.proj"]
    cost, rows = formula(config, lora), 2
    base, transformer = build(config), build(config, targets)
    with torch.no_grad():
        assert count_flops(lambda: forward(base, rows)) == rows * cost.forward
        assert count_flops(lambda: forward(transformer, rows)) == rows * (cost.forward + cost.lora_forward)
    loss = forward(transformer, rows).square().mean()
    assert count_flops(loss.backward) == rows * cost.backward


def test_checkpointing_computes_the_blocks_again():
    config = small(**SHAPES["dual"])
    cost, transformer = formula(config), build(config, TARGETS)
    transformer.enable_gradient_checkpointing()
    loss = forward(transformer, 2).square().mean()
    assert count_flops(loss.backward) == 2 * (cost.backward + cost.recomputed)
    assert 0.9 < cost.recomputed / (cost.forward + cost.lora_forward) < 1


def test_flops_of_the_parts_beside_the_transformer(pipeline_folder):
    parts = read_pipeline(str(pipeline_folder))
    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline_folder)
    with torch.no_grad():
        latents, tokens = torch.zeros(1, 8, SIDE, SIDE), torch.zeros(1, 14, dtype=torch.long)
        assert count_flops(lambda: pipe.vae.decode(latents)) == decoder_flops(parts.vae, SIDE)
        assert count_flops(lambda: pipe.text_encoder(tokens)) == pytest.approx(clip_flops(parts.clips[0]), rel=0.02)
        assert count_flops(lambda: pipe.text_encoder_3(tokens)) == pytest.approx(t5_flops(parts.t5, 14), rel=0.02)
    assert sum(p.numel() for p in pipe.vae.parameters()) == vae_parameters(parts.vae)
    assert sum(p.numel() for p in pipe.text_encoder.parameters()) == clip_parameters(parts.clips[0])
    assert sum(p.numel() for p in pipe.text_encoder_3.parameters()) == t5_parameters(parts.t5)


def test_the_published_vae_with_its_attention():
    vae = read_pipeline("stabilityai/stable-diffusion-3.5-medium").vae
    shape = {key: value for key, value in vae.items() if key != "use_post_quant_conv"}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        model = AutoencoderKL(**shape, **kinds, use_quant_conv=False, use_post_quant_conv=False)
        with torch.no_grad():
            counted = count_flops(lambda: model.decode(torch.zeros(1, 16, 8, 8)))
    assert sum(p.numel() for p in model.parameters()) == vae_parameters(vae)
    assert counted == pytest.approx(decoder_flops(vae, 8), rel=1e-3)


# ---- Bytes -----------------------------------------------------------------------------------------------------------


def kept_bytes(transformer: SD3Transformer2DModel, rows: int, half: bool) -> int:
    """What autograd saves in a forward pass, each storage once, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*transformer.parameters(), *transformer.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        forward(transformer, rows, half)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_kept_bytes_are_those_that_autograd_saves(monkeypatch, shape, half):
    if half:
        layer_norm_as_on_a_gpu(monkeypatch)
    config, rows = small(**SHAPES[shape]), 2
    cost, transformer = formula(config, half=half), build(config, TARGETS, half)
    assert kept_bytes(transformer, rows, half) == pytest.approx(rows * cost.kept + cost.kept_once, rel=0.01)


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors made inside the block that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known | given:
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage) -> None:
        size, name = storage.nbytes(), storage._cdata
        self._known.add(name)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, name, size)

    def _forget(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.live -= size


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_the_peak_of_a_step_is_that_of_the_formula(monkeypatch, half, checkpointing):
    if half:
        layer_norm_as_on_a_gpu(monkeypatch)
    config = small(**SHAPES["dual"], num_layers=6, attention_head_dim=32, num_attention_heads=4)
    config["caption_projection_dim"] = 128
    transformer = build(config, TARGETS, half)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as tracked:
        forward(transformer, 2, half).float().square().mean().backward()
    assert tracked.peak == pytest.approx(formula(config, half=half).activations(2, checkpointing), rel=0.05)


def test_rows_of_memory_are_the_tensors_of_a_run(tiny_config):
    config = tiny_config(num_epochs=1, train__ema=True)
    trainer = Trainer(config, check(config, 1), Accelerator(cpu=True))
    try:
        trainer.run()
    finally:
        trainer.close()
    plan, pipeline = check(config, 1), read_pipeline(config.pretrained.model)
    cost, _ = script.costs_of(config, plan, pipeline)
    rows = dict(script.memory_of(config, plan, pipeline, cost, shards=1).rows)

    def size(tensors) -> int:
        return sum(tensor.nbytes for tensor in tensors)

    model, adapters = trainer.backbone.transformer, trainer.adapters
    every = size(model.parameters()) + size(model.buffers())
    loras = {name: size(adapters.parameters(name)) for name in adapters.configs}
    assert rows["base transformer"] == every - sum(loras.values())
    assert rows["VAE, float32"] == size(trainer.backbone.vae.parameters())
    moments = size(t for n, t in trainer.optimizer.state_tensors().items() if n.endswith(("exp_avg", "exp_avg_sq")))
    held = loras["student"] * 2 + moments + size(trainer.ema.shadow)
    unreached = (
        loras["student"] - moments / 2
    )  # the last block's text queries: no gradient reaches them on some kernels
    assert rows["student: LoRA, gradient, optimizer, EMA"] == pytest.approx(held + 2 * unreached, rel=1e-6)


# ---- Rounds ----------------------------------------------------------------------------------------------------------

ALGORITHMS = {
    "opd": {"train__cfg": True, "sample__guidance_scale": 2.0, "train__beta": 0.1},
    "opd, two passes": {"train__num_inner_epochs": 2},
    "sft": {"train__algorithm": "sft"},
    "nft": {"train__algorithm": "nft", "sample__num_image_per_prompt": 2, "train__beta": 0.1},
    "grpo": {"train__algorithm": "grpo", "sample__num_image_per_prompt": 2, "sample__noise_level": 0.7},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_evaluations_are_those_that_a_run_counts(tiny_config, tmp_path, name):
    config = tiny_config(num_epochs=1, **ALGORITHMS[name])
    plan, pipeline = check(config, 1), read_pipeline(config.pretrained.model)
    _, round_cost = script.costs_of(config, plan, pipeline)
    train(config)
    assert metrics(tmp_path / "logs" / "run")[0]["evaluations"] == round_cost.evaluations


def test_a_round_that_is_looked_at_is_walked_to_its_end(tiny_config, tmp_path):
    config = tiny_config(num_epochs=1, sample_freq=1, train__timestep_fraction=0.5)
    _, round_cost = script.costs_of(config, check(config, 1), read_pipeline(config.pretrained.model))
    train(config)
    row = metrics(tmp_path / "logs" / "run")[0]
    assert round_cost.finishing == 2 * 2 * 2
    assert row["evaluations"] == round_cost.evaluations + round_cost.finishing


def test_three_passes_cost_what_they_say():
    """10 steps, 9 trained, guidance everywhere: 10 + 9 student forwards, 9 backwards, 10 teacher forwards."""
    config = load_config(f"{ROOT}/config/opd.py:sopd_ocr")
    plan, pipeline = check(config, 8, sources=False), read_pipeline(config.pretrained.model)
    cost, round_cost = script.costs_of(config, plan, pipeline)
    forward_flops = cost.forward + cost.lora_forward
    assert round_cost.flops == 72 * 2 * 9 * (2 * forward_flops + cost.backward)
    assert round_cost.reference_flops == 72 * 2 * (29 * forward_flops + 9 * cost.backward)
    assert round_cost.replicated_bytes_sent == 2 * 7 * 4 * cost.lora_parameters // 8


def test_checkpointing_and_shards_trade_work_for_memory():
    def of(**changes):
        config = load_config(f"{ROOT}/config/opd.py:mopd")
        config.update(changes)
        plan, pipeline = check(config, 8, sources=False), read_pipeline(config.pretrained.model)
        cost, round_cost = script.costs_of(config, plan, pipeline)
        return round_cost, [script.memory_of(config, plan, pipeline, cost, shards) for shards in (1, 8)]

    plain, (whole, sharded) = of()
    again, (light, lightest) = of(activation_checkpointing=True)
    assert plain.evaluations == again.evaluations == 72 * 9 * 2 + 24 * 9 * 5
    assert 1.2 < again.flops / plain.flops < 1.4
    assert whole.peak > sharded.peak > light.peak > lightest.peak
    assert plain.sharded_bytes_sent > 100 * plain.replicated_bytes_sent


# ---- The command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["opd", "teacher", "tiny"])
def test_every_shipped_configuration_has_a_cost(file, monkeypatch, capsys):
    names = [line[4:].split("(")[0] for line in (ROOT / f"config/{file}.py").read_text().splitlines() if "def " in line]
    for name in [name for name in names if not name.startswith(("_", "get_config"))]:
        monkeypatch.setattr(
            sys, "argv", ["cost.py", "--config", f"{ROOT}/config/{file}.py:{name}", "--num_processes", "8"]
        )
        monkeypatch.chdir(ROOT)
        script.main()
        printed = capsys.readouterr().out
        assert "peak of a training step" in printed
        assert "evaluations" in printed


def test_the_script_from_anywhere_writes_its_figures(tmp_path):
    file = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "tools/cost.py"), "--config", f"{ROOT}/config/opd.py:mopd"]
    command += ["--num_processes", "8", "--config.resolution=1024", "--json", str(file), "--family"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert figures["evaluations"] == 2376
    assert figures["memory_bytes"]["sharded"]["peak"] < figures["memory_bytes"]["replicated"]["peak"]
    assert "| SD3.5-large | 1024 |" in done.stdout


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ArchitectureError, match="'owner/other' is not known.*give its folder"):
        read_pipeline("owner/other")
    config = load_config(f"{ROOT}/config/opd.py:mopd", [("train.batch_size", "2")])
    with pytest.raises(ConfigError, match="Choose a divisor of 3"):
        check(config, 8, sources=False)


def test_the_table_of_the_guide_is_what_the_script_prints():
    table = script.family_table()
    assert table in (ROOT / "docs" / "scaling.md").read_text("utf-8")
