"""What users give as base model: loaded as the stock pipeline loads it, or refused by name before weights load."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from huggingface_hub import constants
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from diffusionopd.config_schema import ConfigError
from diffusionopd.models.conditions import Conditions
from diffusionopd.models.loading import BackboneError, is_here, load_backbone, load_text_encoder, read_model, text_key
from diffusionopd.models.schedules import flow_levels
from diffusionopd.tiny import models
from diffusionopd.training import check

from .families.sd3 import original_transformer, original_vae

PROMPTS = ["a photo of a red circle", 'a sign that says "347"']
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
WEIGHTS = {"transformer": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors"}


@pytest.fixture
def copied(pipeline_folder, tmp_path) -> Path:
    """A pipeline folder to damage: its files are links, and written anew by what follows."""
    return Path(shutil.copytree(pipeline_folder, tmp_path / "model", copy_function=os.link))


def rewrite(file: Path, change: Callable[[dict], dict]) -> None:
    """Replace the content of a JSON or safetensors file that may be a link."""
    tensors = file.suffix == ".safetensors"
    content = change(dict(load_file(file) if tensors else json.loads(file.read_text())))
    file.unlink()
    save_file(content, file, {"format": "pt"}) if tensors else file.write_text(json.dumps(content))


def weights(part: str, change: Callable[[dict], dict]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / part / WEIGHTS.get(part, "model.safetensors"), change)


def without(part: str, ending: str) -> Callable[[Path], None]:
    return weights(part, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith(ending)})


def configured(file: str, **changes) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / file, lambda config: config | changes)


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / name)


def with_lora(folder: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipeline.fuse_lora()
    shutil.rmtree(folder / "transformer")
    pipeline.transformer.save_pretrained(folder / "transformer")


def scheduled(kind: str, **options) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        shutil.rmtree(folder / "scheduler")
        getattr(diffusers, kind).from_config(options).save_pretrained(folder / "scheduler")
        rewrite(folder / "model_index.json", lambda index: index | {"scheduler": ["diffusers", kind]})

    return save


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULE = "scheduler/scheduler_config.json"
BLOCK = "transformer_blocks.0.attn.to_q."
FAULTS = {
    "CLIP lacks tensors": (without("text_encoder", "0.self_attn.q_proj.weight"), "text_encoder .*0.self_attn.q_proj"),
    "CLIP lacks its projection": (without("text_encoder_2", "text_projection.weight"), "text_encoder_2 .*projection"),
    "T5 lacks tensors": (without("text_encoder_3", "0.SelfAttention.q.weight"), "text_encoder_3 .*SelfAttention.q"),
    "T5 lacks words": (without("text_encoder_3", "shared.weight"), "text_encoder_3 .*shared.weight"),
    "transformer lacks tensors": (without("transformer", "proj_out.bias"), "transformer .*proj_out.bias"),
    "VAE lacks tensors": (without("vae", "decoder.conv_in.weight"), "vae .*decoder.conv_in.weight"),
    "prefix": (weights("vae", lambda tensors: {f"model.{n}": t for n, t in tensors.items()}), "vae .*'model.'"),
    "prefix of CLIP": (weights("text_encoder", lambda t: {f"x.y.{n}": v for n, v in t.items()}), "text_encoder .*x.y."),
    "LoRA fused": (with_lora, rf"transformer .*{BLOCK}base_layer.*unload_lora_weights"),
    "scaled fp8": (
        weights("transformer", lambda tensors: tensors | {f"{BLOCK}scale_weight": torch.ones(1)}),
        f"transformer .*{BLOCK}scale_weight",
    ),
    "other shapes": (configured("transformer/config.json", num_layers=5), "transformer .*blocks.3.attn.to_add_out"),
    "T5 of other shapes": (configured("text_encoder_3/config.json", d_ff=128), "text_encoder_3 .*DenseReluDense"),
    "T5 did not come": (removed("text_encoder_3"), "text_encoder_3 .*null"),
    "tokenizer did not come": (removed("tokenizer_2"), "tokenizer_2"),
    "scheduler did not come": (removed("scheduler"), "scheduler"),
    "weights did not come": (
        lambda folder: (folder / "vae" / WEIGHTS["vae"]).unlink(), f"vae.*{WEIGHTS['vae']}(?!.*\\.bin)",
    ),
    "VAE of another class": (configured("model_index.json", vae=["diffusers", "AutoencoderTiny"]), "AutoencoderTiny"),
    "VAE's config of another class": (configured("vae/config.json", _class_name="AutoencoderTiny"), "AutoencoderTiny"),
    "DDIM": (scheduled("DDIMScheduler"), "DDIMScheduler"),
    "no flow": (scheduled("UniPCMultistepScheduler"), "UniPCMultistepScheduler"),
    "inverted": (configured(SCHEDULE, invert_sigmas=True), "invert_sigmas"),
    "two shifts": (configured(SCHEDULE, flow_shift=5.0), "shift 3.*flow_shift 5"),
    "exponential": (scheduled("UniPCMultistepScheduler", **FLOW, use_exponential_sigmas=True), "use_exponential"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_base_that_is_not_whole_is_refused_by_name(fault, copied):
    damage, expected = FAULTS[fault]
    damage(copied)
    with pytest.raises(BackboneError, match=rf"(?s){copied}.*{expected}"):
        read_model(str(copied))


QUANTISED = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def test_everything_wrong_is_said_at_once_and_in_the_plan(copied, tiny_config):
    wrong = ["CLIP lacks tensors", "T5 did not come", "VAE lacks tensors", "LoRA fused", "inverted"]
    for fault in sorted(wrong, key="LoRA fused".__ne__):
        FAULTS[fault][0](copied)
    with pytest.raises(ConfigError) as caught:
        check(tiny_config(pretrained__model=str(copied)), 1)
    assert all(problem.startswith("pretrained.model") for problem in caught.value.problems)
    for fault in wrong:
        with pytest.raises(BackboneError, match=rf"(?s){FAULTS[fault][1]}"):
            raise BackboneError("\n".join(caught.value.problems))


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="is about a package that is not there")
@pytest.mark.parametrize("part", ["transformer", "text_encoder_3"])
def test_a_quantised_part_names_the_package_that_reads_it(part, copied):
    configured(f"{part}/config.json", quantization_config=QUANTISED)(copied)
    with pytest.raises(BackboneError, match=f"{part} .*bitsandbytes"):
        read_model(str(copied))


def test_tensors_that_need_no_file_are_no_fault(copied):
    """T5's words have two names; older files hold the positions' numbers; a decoder of T5 is not used."""
    expected = load_text_encoder(str(copied), max_sequence_length=14)(PROMPTS)
    weights("text_encoder_3", lambda t: t | {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2)})(copied)
    weights("text_encoder", lambda t: t | {"text_model.embeddings.position_ids": torch.arange(14)[None]})(copied)
    for old, new in (("shared", "encoder.embed_tokens"), ("encoder.embed_tokens", "shared")):
        weights("text_encoder_3", lambda t, old=old, new=new: {n.replace(old, new): v for n, v in t.items()})(copied)
        found = load_text_encoder(str(copied), max_sequence_length=14)(PROMPTS)
        assert all(torch.equal(a[name], b[name]) for a, b in zip(found, expected, strict=True) for name in a)


# --- schedulers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *(("FlowMatchEulerDiscreteScheduler", options) for options in (
            {"shift": 1.0}, {"shift": 3.0}, {"shift": 3.0, "use_karras_sigmas": True},
            {"shift": 3.0, "shift_terminal": 0.02}, {"use_dynamic_shifting": True},
            {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        )),
        ("UniPCMultistepScheduler", FLOW),
        ("UniPCMultistepScheduler", FLOW | {"use_dynamic_shifting": True}),
        ("DPMSolverMultistepScheduler", FLOW),
        ("DPMSolverSinglestepScheduler", FLOW),
    ],
)  # fmt: skip
def test_noise_levels_are_those_of_the_pipelines_scheduler(kind, options, copied):
    scheduled(kind, **options)(copied)
    stock = StableDiffusion3Pipeline.from_pretrained(copied).scheduler
    # The pipeline's rule for 16 x 16 latents, thus 64 tokens.
    mu = {"mu": 0.5 + (stock.config.get("max_shift", 1.16) - 0.5) * (64 - 256) / (4096 - 256)}
    for steps in (4, 10):
        stock.set_timesteps(steps, **(mu if options.get("use_dynamic_shifting") else {}))
        torch.testing.assert_close(
            load_backbone(str(copied)).sigmas(steps, 64), stock.sigmas.double(), rtol=1e-6, atol=0
        )
        if kind.startswith("FlowMatch"):
            even = np.linspace(1, 1 / steps, steps)
            stock.set_timesteps(sigmas=even, **(mu if options.get("use_dynamic_shifting") else {}))
            found = load_backbone(str(copied)).sigmas(steps, 64, "linspace")
            torch.testing.assert_close(found, stock.sigmas.double(), rtol=1e-6, atol=0)


def test_other_solvers_of_flow_matching_give_the_levels_of_euler_steps():
    expected = flow_levels(FlowMatchEulerDiscreteScheduler(shift=3.0), 5)
    for kind in ("FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"):
        assert torch.equal(flow_levels(getattr(diffusers, kind)(shift=3.0), 5), expected)


def test_even_levels_have_the_shift_of_any_scheduler():
    for scheduler in (FlowMatchEulerDiscreteScheduler(shift=3.0), diffusers.UniPCMultistepScheduler(**FLOW)):
        shift = scheduler.config.get("flow_shift", scheduler.config.get("shift"))
        expected = [shift * s / (1 + (shift - 1) * s) for s in (1, 0.75, 0.5, 0.25, 0)]
        assert flow_levels(scheduler, 4, schedule="linspace").tolist() == pytest.approx(expected, rel=1e-6)


# --- variants --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["whole", "sharded"])
def fp16_only(request, pipeline_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_folder, dtype=torch.float16)
    options = {"max_shard_size": "200KB"} if request.param == "sharded" else {}
    pipeline.save_pretrained(folder, variant="fp16", **options)
    assert (len([*folder.glob("transformer/*fp16*-of-*")]) > 1) == (request.param == "sharded")
    return folder


def assert_equal_to_stock(stock: DiffusionPipeline, **source) -> None:
    """Weights of transformer and VAE, and embeddings."""
    backbone = load_backbone(**source)
    for name in ("transformer", "vae"):
        mine, other = getattr(backbone, name).state_dict(), getattr(stock, name).state_dict()
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key].to(mine[key].dtype)) for key in mine)
    tokens, _, pooled, _ = stock.encode_prompt(
        PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=14, device="cpu"
    )
    rows = Conditions.of(load_text_encoder(**source, max_sequence_length=14)(PROMPTS))
    torch.testing.assert_close(rows["tokens"], tokens.detach())
    torch.testing.assert_close(rows["pooled"], pooled.detach())


def test_a_variant_is_loaded_as_the_stock_pipeline_does(fp16_only, pipeline_folder, tmp_path):
    stock = StableDiffusion3Pipeline.from_pretrained(fp16_only, variant="fp16", dtype=torch.float32)
    assert_equal_to_stock(stock, model=str(fp16_only), variant="fp16")
    for read in (read_model, load_backbone, load_text_encoder):
        with pytest.raises(BackboneError, match="(?s)text_encoder_3.*pretrained.variant.*'fp16'"):
            read(str(fp16_only))
        with pytest.raises(BackboneError, match="(?s)'bf16'.*pretrained.variant.*fp16"):
            read(str(fp16_only), variant="bf16")
        with pytest.raises(BackboneError, match=r"'fp16'.*pretrained.variant"):
            read(str(pipeline_folder), variant="fp16")
    mixed = Path(shutil.copytree(fp16_only, tmp_path / "model"))
    shutil.rmtree(mixed / "vae")
    shutil.copytree(pipeline_folder / "vae", mixed / "vae")
    load_backbone(str(mixed), variant="fp16")
    shutil.copytree(pipeline_folder, mixed, dirs_exist_ok=True)
    assert text_key(str(mixed), variant="fp16") != text_key(str(mixed))


# --- single files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_file(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A pipeline whose CLIPs differ in width, as those of the published models do, and its tensors under the names of
    a checkpoint in the original form."""
    folder = tmp_path_factory.mktemp("single") / "model"
    pipeline = models.pipeline(models.autoencoder(0), 0)
    pipeline.text_encoder = models.clip_encoder(pipeline.tokenizer, 1, width=32)
    pipeline.text_encoder_2 = models.clip_encoder(pipeline.tokenizer_2, 2, width=96)
    torch.nn.init.eye_(pipeline.text_encoder.text_projection.weight)
    pipeline.save_pretrained(folder)
    names = dict(zip(ENCODERS, ("clip_l", "clip_g", "t5xxl"), strict=True))
    tensors = {f"model.diffusion_model.{n}": t for n, t in original_transformer(pipeline.transformer).items()}
    tensors |= {f"first_stage_model.{n}": t for n, t in original_vae(pipeline.vae).items()}
    for part, name in names.items():
        state = getattr(pipeline, part).state_dict()
        state.pop("encoder.embed_tokens.weight", None)
        tensors |= {f"text_encoders.{name}.transformer.{n}": t for n, t in state.items()}
    del tensors["text_encoders.clip_l.transformer.text_projection.weight"]
    return folder, {name: tensor.contiguous() for name, tensor in tensors.items()}


@pytest.mark.parametrize("inside", ["all", "no encoders", "transformer only", "two encoders", "bare", "diffusers"])
def test_a_single_file_is_the_stock_pipelines(inside, with_file, tmp_path):
    """What it does not hold comes from the pipeline that is named for its configurations."""
    folder, tensors = with_file
    kept = {
        "all": "", "no encoders": ("model.", "first"), "transformer only": "model.", "bare": "model.",
        "two encoders": ("model.", "first", "text_encoders.clip_g", "text_encoders.t5xxl"),
    }  # fmt: skip
    stock = StableDiffusion3Pipeline.from_pretrained(folder)
    file = tmp_path / "base.safetensors"
    if inside == "diffusers":
        save_file(load_file(folder / "transformer" / WEIGHTS["transformer"]), file)
    else:
        bare = {n: t for n, t in tensors.items() if n.startswith(kept[inside])}
        save_file(
            {n.removeprefix("model.diffusion_model.") if inside == "bare" else n: t for n, t in bare.items()}, file
        )
    assert_equal_to_stock(stock, model=str(file), config=str(folder))


def test_a_single_file_that_lacks_something_is_refused_by_name(with_file, tmp_path, tiny_config):
    folder, tensors = with_file
    bare = tmp_path / "configurations"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    clip, t5, x = "text_encoders.clip_g.transformer.", "text_encoders.t5xxl.transformer.", "model.diffusion_model."
    for gone, more, expected in (
        (t5, {}, "text_encoder_3"),
        ("first_stage_model", {}, "vae"),
        (f"{clip}text_projection.weight", {}, "text_encoder_2 .*text_projection.weight"),
        (f"{t5}encoder.block.1.layer.0", {}, "text_encoder_3 .*encoder.block.1.layer.0"),
        ("-", {f"{t5}encoder.block.0.layer.0.SelfAttention.q.scale_weight": torch.ones(1)}, "text_encoder_3 .*q.scale"),
        (f"{x}joint_blocks.1.x_block.attn.qkv.weight", {}, "joint_blocks.1.x_block.attn.qkv.weight"),
        (f"{x}final_layer.linear", {}, "final_layer.linear"),
        ("first_stage_model.decoder.conv_in", {}, "vae .*decoder.conv_in"),
        (x, {}, "SD3Transformer2DModel"),
    ):  # fmt: skip
        file = tmp_path / "base.safetensors"
        save_file({n: t for n, t in tensors.items() if not n.startswith(gone)} | more, file)
        with pytest.raises(BackboneError, match=rf"(?s){file}.*{expected}"):
            read_model(str(file), config=str(bare))
    with pytest.raises(ConfigError, match=r"(?s)pretrained.model.*SD3Transformer2DModel"):
        check(tiny_config(pretrained__model=str(file), pretrained__config=str(bare)), 1)
    save_file(tensors, file)
    assert read_model(str(file), config=str(bare)).configs["transformer"]["in_channels"] == 8
    with pytest.raises(BackboneError, match=r"pretrained.config"):
        read_model(str(folder), config=str(folder))
    with pytest.raises(BackboneError, match=rf"(?s){file}.*pretrained.config"):  # its own are not here
        read_model(str(file))


def test_text_key_follows_the_encoders_of_a_single_file(with_file, tmp_path):
    folder, tensors = with_file
    file, keys = tmp_path / "base.safetensors", []
    for change in ("", "model.diffusion_model.", "text_encoders.clip_g"):
        save_file({n: t + 1 if change and n.startswith(change) else t for n, t in tensors.items()}, file)
        keys.append(text_key(str(file), config=str(folder)))
    assert keys[0] == keys[1] != keys[2]


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The hub's cache; the tests are offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_what_lies_in_the_hubs_cache_is_used_and_checked(hub, pipeline_folder, with_file, tiny_config, tmp_path):
    name, commit = "models--owner--base", "a" * 40
    assert not is_here("owner/base")
    with pytest.raises(BackboneError, match=r"(?s)owner/base.*HF_HOME"):
        load_backbone("owner/base")
    snapshot = hub / name / "snapshots" / commit
    shutil.copytree(pipeline_folder, snapshot)
    (hub / name / "refs").mkdir()
    (hub / name / "refs" / "main").write_text(commit)
    assert_equal_to_stock(StableDiffusion3Pipeline.from_pretrained(pipeline_folder), model="owner/base")
    config = tiny_config(pretrained__model="owner/base")
    assert check(config, 1)
    (snapshot / "transformer" / WEIGHTS["transformer"]).unlink()  # not yet downloaded, for all that is known
    assert check(config, 1)
    with pytest.raises(BackboneError, match=f"transformer.*{WEIGHTS['transformer']}"):
        load_backbone("owner/base")
    without("vae", "decoder.conv_in.weight")(snapshot)
    with pytest.raises(ConfigError, match=r"(?s)pretrained.model.*vae.*decoder.conv_in.weight"):
        check(config, 1)
    folder, tensors = with_file
    save_file(tensors, snapshot / "base.safetensors")
    source = {"model": "owner/base/base.safetensors", "config": str(folder)}
    assert_equal_to_stock(StableDiffusion3Pipeline.from_pretrained(folder), **source)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    cache = str(tmp_path / "file" / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    for load in (load_backbone, load_text_encoder, text_key):
        with pytest.raises(BackboneError, match=rf"(?s){cache}.*HF_HOME"):
            load("owner/base")
