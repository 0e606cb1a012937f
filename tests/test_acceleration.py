"""Attention kernels and compiled blocks: the same numbers, as many graphs as said, and early errors."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch._dynamo.utils import counters

from diffusionopd.models import acceleration
from diffusionopd.models.acceleration import (
    AccelerationError,
    check_compiler,
    choose_attention,
    compile_blocks,
    no_new_graphs,
)
from diffusionopd.models.loading import load_backbone
from diffusionopd.models.lora import Adapters
from diffusionopd.models.lora_files import load_lora
from diffusionopd.models.merged import MergedTeachers

from .helpers import assert_near, perturb, velocities

CPU = torch.device("cpu")
FEW = ["attn.to_q", "attn.add_k_proj"]  # adapted layers: compiling takes long enough with these


def build(pipeline_folder, make_lora, kind=Adapters):
    """A model of two blocks of two kinds (the last drops its text stream) with a student and a teacher."""
    backbone = load_backbone(str(pipeline_folder))
    del backbone.transformer.transformer_blocks[1:3]
    adapters = kind(backbone.transformer)
    adapters.add_student("student", rank=8, alpha=16, target_modules=FEW, seed=1)
    weights = load_lora(make_lora(1))
    names = [f"transformer_blocks.0.{name}" for name in FEW]
    few = {part: {name: getattr(weights, part)[name] for name in names} for part in ("a", "b", "alpha")}
    adapters.add_teacher("teacher", dataclasses.replace(weights, **few, config=None))
    perturb(adapters, std=0.05)
    return backbone, adapters


SWITCHES = ("student", "teacher", None, "teacher", "student")


@pytest.fixture
def fresh_graphs():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "checkpointing", "used"),
    [(Adapters, False, 3), (MergedTeachers, True, 2)],
    ids=["LoRAs", "merged and checkpointed"],
)
def test_compiled_blocks_follow_every_switch(pipeline_folder, make_lora, text, fresh_graphs, kind, checkpointing, used):
    """One graph a kind of block and adapter; merged teachers and the base are one. Nothing is compiled again later."""
    plain = velocities(*build(pipeline_folder, make_lora), text, SWITCHES)
    backbone, adapters = build(pipeline_folder, make_lora, kind)
    if checkpointing:
        backbone.transformer.enable_gradient_checkpointing()
        choose_attention(backbone.transformer, "flash", dtype=torch.float32, device=CPU)
    compile_blocks(backbone.blocks(), backend="aot_eager")
    assert_near(velocities(backbone, adapters, text, SWITCHES), plain, rel=1e-5)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 2 * used
    assert not counters["graph_break"]
    velocities(backbone, adapters, text, SWITCHES)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
def test_generated_code_gives_the_same_numbers(pipeline_folder, make_lora, text, fresh_graphs):
    """The real compiler on one block of the teacher's."""
    plain, compiled = (build(pipeline_folder, make_lora) for _ in range(2))
    compile_blocks(compiled[0].blocks())
    results = []
    for backbone, adapters in (plain, compiled):
        del backbone.transformer.transformer_blocks[1:]
        adapters.use("teacher")
        x = torch.randn(2, *backbone.latent_shape(64), generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            results.append([backbone.velocity(x, 0.7, text(2))[0]])
    assert_near(*results, rel=1e-5)


def test_evaluations_use_graphs_that_are_there_and_make_none(pipeline_folder, make_lora, text, fresh_graphs):
    backbone, adapters = build(pipeline_folder, make_lora)
    compile_blocks(backbone.blocks(), backend="aot_eager")
    adapters.use("student")

    def pictures(rows: int) -> None:
        with torch.no_grad():
            backbone.velocity(torch.zeros(rows, *backbone.latent_shape(64)), 0.7, text(rows))

    with no_new_graphs():
        pictures(2)
    assert not counters["stats"]["unique_graphs"]
    pictures(1)
    made = counters["stats"]["unique_graphs"]
    with no_new_graphs():
        pictures(1)
        pictures(2)
    assert counters["stats"]["unique_graphs"] == made > 0


def test_what_cannot_be_compiled_runs_as_it_is_and_says_why(pipeline_folder, make_lora, text, fresh_graphs, caplog):
    def broken(graph, inputs):
        raise RuntimeError("no such instruction")

    plain = velocities(*build(pipeline_folder, make_lora), text, ("student",))
    backbone, adapters = build(pipeline_folder, make_lora)
    compile_blocks(backbone.blocks(), backend=broken)
    assert_near(velocities(backbone, adapters, text, ("student",)), plain, rel=0)
    assert "no such instruction" in caplog.text


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(acceleration, "find_spec", lambda name: None)
    with pytest.raises(AccelerationError, match="Triton"):
        check_compiler(torch.device("cuda"))
    monkeypatch.setattr(acceleration, "find_spec", lambda name: True)
    monkeypatch.setenv("PATH", "")
    for device, variable in (("cpu", "CXX"), ("cuda", "CC")):
        with pytest.raises(AccelerationError, match=rf"compile needs a C.* compiler.*name it in {variable}"):
            check_compiler(torch.device(device))
        monkeypatch.setenv(variable, "no-such-compiler")
        with pytest.raises(AccelerationError, match="no-such-compiler"):
            check_compiler(torch.device(device))


def test_attention_kernels_give_the_same_velocity_and_gradient(pipeline_folder, make_lora, text):
    plain = velocities(*build(pipeline_folder, make_lora), text, SWITCHES)
    for name, kernel in (("math", "attention_math"), ("flash", "flash_attention")):
        backbone, adapters = build(pipeline_folder, make_lora)
        backbone.transformer.enable_gradient_checkpointing()
        choose_attention(backbone.transformer, name, dtype=torch.float32, device=CPU)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as traced:
            assert_near(velocities(backbone, adapters, text, SWITCHES), plain, rel=1e-5)
        ran = " ".join(event.key for event in traced.key_averages())
        used = {each for each in ("attention_math", "flash_attention") if f"dot_product_{each}" in ran}
        assert used == {kernel}, "in the backward's second forward too"
    with pytest.raises(AccelerationError, match=r"attention_backend 'cudnn' cannot run here \(cpu, torch.float32\)"):
        choose_attention(backbone.transformer, "cudnn", dtype=torch.float32, device=CPU)


class Masking:
    """A processor as many families have one: masks and rotary embeddings are arguments of its own."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, mask=None, image_rotary_emb=None
    ):
        heads = hidden_states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        query = heads if image_rotary_emb is None else heads * image_rotary_emb
        out = torch.nn.functional.scaled_dot_product_attention(query, heads, heads, mask)
        return out.transpose(1, 2).flatten(2)


def test_a_chosen_kernel_sees_masks_and_rotary_embeddings():
    """diffusers' attention drops, with a log line at most, what the signature of its processor does not name."""
    layers = torch.nn.ModuleList(Attention(8, heads=2, dim_head=4, processor=Masking()) for _ in range(2))
    shared = layers[0].processor
    layers[1].set_processor(shared)
    x = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    options = {"mask": torch.tensor([[True, True, False]]), "image_rotary_emb": torch.tensor([2.0, 1, 1, 1])}
    plain, bare = layers[0](x, **options), layers[0](x)
    assert not torch.allclose(plain, bare, atol=1e-3)
    choose_attention(layers, "math", dtype=torch.float32, device=CPU)
    assert isinstance(layers[0].processor, Masking)
    for layer in layers:
        torch.testing.assert_close(layer(x, **options), plain)
