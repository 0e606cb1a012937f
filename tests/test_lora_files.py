"""LoRAs of other tools are read exactly or refused with a way out; a saved student has its full effect everywhere."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusionopd.config_schema import ConfigError
from diffusionopd.models.loading import load_backbone, read_model
from diffusionopd.models.lora import Adapters
from diffusionopd.models.lora_files import AdapterError, load_lora
from diffusionopd.models.lora_fit import find_all, fit, is_of_another_base, linear_layers
from diffusionopd.training import check

from .conftest import TARGETS
from .families.sd3 import original_transformer
from .helpers import peft_velocity, perturb, velocity

SCALES = ((2, 1.0), (3, 4.5), (5, 5.0))  # rank and alpha, in turn


@pytest.fixture(scope="module")
def empty(pipeline_folder):
    """The transformer without weights."""
    return read_model(str(pipeline_folder)).empty_transformer()


def random_layers(shapes):
    """Name -> A, B, alpha: ranks and alphas differ by layer."""
    generator = torch.Generator().manual_seed(7)
    layers = {}
    for i, (name, (out, width)) in enumerate(shapes.items()):
        rank, alpha = SCALES[i % 3]
        a, b = (torch.randn(shape, generator=generator) * 0.1 for shape in ((rank, width), (out, rank)))
        layers[name] = a, b, alpha
    return layers


def delta(a, b, alpha=None):
    return (1 if alpha is None else alpha / len(a)) * b.double() @ a.double()


def assert_reads(file, empty, expected):
    """The file adds what is expected to each module's matrix."""
    weights = fit(load_lora(file), empty)
    assert weights.a.keys() == expected.keys()
    for name, wanted in expected.items():
        found = delta(weights.a[name], weights.b[name], weights.alpha[name])
        assert (found - wanted).norm() <= 1e-6 * wanted.norm(), name


def flat(name):
    return name.replace(".", "_")


def write(folder, layers, key, down="lora_down", up="lora_up", alpha=torch.tensor, name="my style.safetensors"):
    """A file as other tools write it; without `alpha` tensors the scale is in B."""
    tensors = {}
    for layer, (a, b, value) in layers.items():
        stem = key(layer)
        tensors |= {f"{stem}.{down}.weight": a, f"{stem}.{up}.weight": b if alpha else b * (value / len(a))}
        if alpha:
            tensors[f"{stem}.alpha"] = alpha(value)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name)
    return folder


AB = {"down": "lora_A", "up": "lora_B", "alpha": None}
SPELLINGS = {
    "OneTrainer": (lambda n: f"lora_transformer_{flat(n)}", {}),
    "LyCORIS, alphas of shape [1]": (lambda n: f"lycoris_{flat(n)}", {"alpha": lambda v: torch.tensor([v]).half()}),
    "lora.down, lora.up": (lambda n: f"transformer.{n}", AB | {"down": "lora.down", "up": "lora.up"}),
    "diffusers with alphas": (lambda n: f"transformer.{n}", AB | {"alpha": torch.tensor}),
    "an adapter's name": (lambda n: f"base_model.model.{n}", AB | {"down": "lora_A.default", "up": "lora_B.default"}),
    "doubled prefixes": (lambda n: f"transformer.base_model.model.{n}", AB),
    "the other way round": (lambda n: f"base_model.model.transformer.{n}", AB),
    "compiled": (lambda n: "module._orig_mod." + n.replace("blocks.1.", "blocks.1._orig_mod."), AB),
    "no prefix": (lambda n: n, AB),
    "ComfyUI's prefix": (lambda n: f"diffusion_model.{n}", AB),
}


def test_every_spelling_of_a_module_is_read_exactly(empty, tmp_path):
    layers = random_layers(linear_layers(empty))
    expected = {name: delta(*layer) for name, layer in layers.items()}
    for what, (key, options) in SPELLINGS.items():
        assert_reads(write(tmp_path / flat(what), layers, key, **options), empty, expected)
    whole = {name: (a, b, 4) for name, (a, b, _) in layers.items()}
    folder = write(tmp_path / "integers", whole, SPELLINGS["OneTrainer"][0])
    assert_reads(folder / "my style.safetensors", empty, {name: delta(*layer) for name, layer in whole.items()})


def test_names_of_the_original_code_are_those_of_diffusers_converter(empty, tmp_path):
    """kohya's and ComfyUI's layers, fused and with swapped halves: their matrices go through stock diffusers."""
    state = {n: torch.zeros(t.shape) for n, t in original_transformer(empty).items()}
    shapes = {n.removesuffix(".weight"): t.shape for n, t in state.items() if t.ndim == 2}
    layers = random_layers(shapes)
    matrices = {f"{name}.weight": delta(*layer) for name, layer in layers.items()}
    converted = convert_sd3_transformer_checkpoint_to_diffusers(state | matrices)
    expected = {n: converted[f"{n}.weight"] for n in linear_layers(empty)}
    assert len(expected) > len(layers)
    assert_reads(write(tmp_path / "kohya", layers, lambda n: f"lora_unet_{flat(n)}"), empty, expected)
    assert_reads(write(tmp_path / "comfyui", layers, lambda n: f"diffusion_model.{n}", **AB), empty, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 3, "lora_alpha": 1},
        {"r": 8, "lora_alpha": 4, "target_modules": ["ff.net.2"]},
        {"exclude_modules": ["transformer_blocks.0.attn.to_q"]},
        {"exclude_modules": r".*transformer_blocks\.3\..*"},
        {"layers_to_transform": [0, 2], "layers_pattern": "transformer_blocks"},
        {"use_rslora": True, "rank_pattern": {"0.attn.to_q": 2},
         "alpha_pattern": {"^transformer_blocks.1.attn.to_v": 9}},
        {"init_lora_weights": "orthogonal"},
    ],
)  # fmt: skip
def test_configurations_of_peft_are_those_of_peft(pipeline_folder, text, tmp_path, options):
    """Also from a .bin, and by the weights' own path: their configuration lies beside them."""
    plain = {"r": 4, "lora_alpha": 6, "target_modules": ["attn.to_q", "attn.to_v"], "init_lora_weights": "gaussian"}
    model = get_peft_model(load_backbone(str(pipeline_folder)).transformer, LoraConfig(**(plain | options)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(tmp_path)
    expected, backbone = peft_velocity(pipeline_folder, tmp_path, text), load_backbone(str(pipeline_folder))
    adapters = Adapters(backbone.transformer)
    adapters.add_teacher("folder", tmp_path)
    adapters.add_teacher("file", tmp_path / "adapter_model.safetensors")
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    adapters.add_teacher("pickle", tmp_path)
    for name in ("folder", "file", "pickle"):
        adapters.use(name)
        torch.testing.assert_close(velocity(backbone, text), expected, rtol=1e-5, atol=1e-6)


# --- out --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [False, True])
def test_a_saved_student_has_its_full_effect_wherever_it_goes(pipeline_folder, text, tmp_path, mixed):
    """Velocities within 1e-5 of the LoRA's effect: ComfyUI's rule, stock diffusers with and without the header, PEFT,
    and here, with one rank and alpha or those of each module."""
    folder = str(pipeline_folder)
    backbone = load_backbone(folder)
    base, adapters = velocity(backbone, text), Adapters(backbone.transformer)
    if mixed:
        layers = random_layers(linear_layers(backbone.transformer))
        adapters.add_from("student", write(tmp_path / "mixed", layers, lambda n: n), trainable=True)
    else:
        adapters.add_student("student", rank=8, alpha=24, target_modules=TARGETS)
        perturb(adapters, std=0.05)
    adapters.use("student")
    trained = velocity(backbone, text)
    adapters.save_peft("student", tmp_path / "lora", base_model="base/model")
    adapters.save_diffusers("student", tmp_path / "diffusers")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base/model"
    peft, file = tmp_path / "lora/adapter_model.safetensors", tmp_path / "diffusers/pytorch_lora_weights.safetensors"
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(file), bare)

    def comfyui(transformer, source):
        tensors, modules = load_file(source), dict(transformer.named_modules())
        for key in [key for key in tensors if key.endswith(".lora_B.weight")]:
            stem = key.removesuffix(".lora_B.weight")
            assert f"{stem}.alpha" not in tensors  # which would divide, and stock diffusers refuses it
            name = stem.removeprefix("transformer.").removeprefix("base_model.model.")
            modules[name].weight.data += tensors[key] @ tensors[f"{stem}.lora_A.weight"]
        return transformer

    def diffusers(transformer, source):
        tensors, metadata = StableDiffusion3Pipeline.lora_state_dict(str(source), return_lora_metadata=True)
        assert (metadata is None) == (source == bare)
        StableDiffusion3Pipeline.load_lora_into_transformer(tensors, transformer, metadata=metadata)
        return transformer

    def here(transformer, source):
        adapters = Adapters(transformer)
        adapters.add_teacher("again", source)
        adapters.use("again")
        return transformer

    def by_peft(transformer, source):
        return PeftModel.from_pretrained(transformer, source.parent).eval()

    for source, uses in (
        (file, (comfyui, diffusers, here)), (bare, (diffusers, here)), (peft, (comfyui, here, by_peft))
    ):  # fmt: skip
        for apply in uses:
            other = load_backbone(folder)
            other.transformer = apply(other.transformer, source)
            assert (velocity(other, text) - trained).norm() < 1e-5 * (trained - base).norm(), (apply, source)


def test_training_goes_on_from_an_exported_start_as_if_it_had_not_been_exported(pipeline_folder, text, tmp_path):
    """A start gets the scale of a fresh student, whatever its own: bit for bit where they are powers of two."""
    results = []
    for exported in (False, True):
        backbone = load_backbone(str(pipeline_folder))
        adapters = Adapters(backbone.transformer)
        if exported:
            adapters.add_from("student", load_lora(tmp_path / "lora").rescaled(16, 8), trainable=True)
        else:
            adapters.add_student("student", rank=8, alpha=16, target_modules=TARGETS)
            perturb(adapters, std=0.05)
            adapters.save_peft("student", tmp_path / "lora")
        adapters.use("student")
        optimizer = torch.optim.AdamW(adapters.parameters("student"), lr=1e-2)
        x = torch.randn(2, *backbone.latent_shape(64), generator=torch.Generator().manual_seed(5))
        backbone.velocity(x, 0.7, text(2))[0].square().mean().backward()
        optimizer.step()
        results.append([p.detach() for p in adapters.parameters("student")])
    assert all(torch.equal(mine, other) for mine, other in zip(*results, strict=True))
    weights = load_lora(tmp_path / "lora")
    other = weights.rescaled(10, 12)  # a start of another rank keeps its rank
    for name, a in other.a.items():
        assert other.alpha[name] / len(a) == pytest.approx(10 / 12)
        torch.testing.assert_close(delta(a, other.b[name], other.alpha[name]), delta(a, weights.b[name], 8.0))


# --- refused ----------------------------------------------------------------------------------------------------------


def renamed(tensors, old, new):
    return {key.replace(old, new, 1): tensor.clone() for key, tensor in tensors.items()}


def peft_config(tensors, **options):
    return tensors, {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["attn.to_q"]} | options


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda t: peft_config(t, use_dora=True), ("use_dora", "save_as_lora")),
        (lambda t: (t | {"transformer.x.lora_magnitude_vector": torch.ones(4)}, None), ("DoRA", "save_as_lora")),
        (lambda t: (t | {"lora_unet_x.dora_scale": torch.ones(4)}, None), ("DoRA",)),
        (lambda t: ({"lycoris_x.lokr_w1": torch.ones(4, 4)}, None), ("LoKr", "extract_locon")),
        (lambda t: ({"lycoris_x.hada_w1_a": torch.ones(4, 4)}, None), ("LoHa",)),
        (lambda t: ({"base_model.model.x.hada_w1_a": torch.ones(4, 4)}, {"peft_type": "LOHA"}), ("LOHA",)),
        *(
            (lambda t, i=init: peft_config(t, init_lora_weights=i), (init, "path_initial_model_for_weight_conversion"))
            for init in ("pissa", "pissa_niter_16", "olora", "corda", "lora_ga")
        ),
        (lambda t: peft_config(t, init_lora_weights="loftq"), ("loftq", "merge")),
        (lambda t: peft_config(t, lora_bias=True), ("lora_bias",)),
        (lambda t: (t | {"text_encoder.x.lora_A.weight": torch.ones(4, 4)}, None), ("text_encoder.x", "safe_open")),
        (lambda t: (t | {"lora_te1_x.lora_down.weight": torch.ones(4, 4)}, None), ("lora_te1_x", "safe_open")),
        (lambda t: (renamed(t, ".weight", ".one.weight") | renamed(t, ".weight", ".two.weight"), None), ("one, two",)),
        (lambda t: (t | {f"{k[:-14]}.alpha": torch.tensor(0.0) for k in t if "lora_B" in k}, None), ("alpha", "to_q")),
        (lambda t: (t | {"transformer.y.alpha": torch.tensor(1.0)}, None), ("y",)),
        (lambda t: (t | renamed(t, "transformer.", "module.transformer."), None), ("0.attn.to_q",)),
        (lambda t: ({k: v.to(torch.int32) for k, v in t.items()}, None), ("to_q",)),
    ],
)  # fmt: skip
def test_what_is_no_plain_lora_of_the_transformer_is_refused_with_the_way_out(tmp_path, change, facts):
    stem = "transformer.transformer_blocks.0.attn.to_q"
    tensors, config = change({f"{stem}.lora_A.weight": torch.ones(4, 128), f"{stem}.lora_B.weight": torch.ones(128, 4)})
    source = tmp_path / "file.safetensors"
    if config:
        source = tmp_path / "adapter_model.safetensors"
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, source)
    for place in (source, tmp_path):
        with pytest.raises(AdapterError) as caught:
            load_lora(place)
        assert all(fact in str(caught.value) for fact in (str(place), *facts)), caught.value


def test_a_file_of_pefts_without_its_configuration_has_lost_its_strength(adapters, tmp_path):
    adapters.save_peft("teacher_a", tmp_path)
    assert load_lora(tmp_path).alpha == load_lora(tmp_path / "adapter_model.safetensors").alpha
    (tmp_path / "adapter_config.json").unlink()
    for place in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(AdapterError, match="adapter_config.json"):
            load_lora(place)


def test_the_command_that_keeps_the_transformers_part_keeps_its_scale(empty, adapters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapters.save_diffusers("teacher_a", tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as handle:
        header, tensors = handle.metadata(), {key: handle.get_tensor(key) for key in handle.keys()}
    header["lora_adapter_metadata"] = header["lora_adapter_metadata"].replace('lora_alpha": 4', 'lora_alpha": 12')
    save_file(tensors | {"text_encoder.x.lora_A.weight": torch.ones(4, 4)}, file, header)
    with pytest.raises(AdapterError) as caught:
        load_lora(file)
    exec(str(caught.value).partition('-c "')[2].rstrip('"'), {})  # noqa: S102 (the command that the message gives)
    assert set(load_lora("transformer_only.safetensors").alpha.values()) == {12.0}


# --- where, and before weights load -----------------------------------------------------------------------------------


def test_files_of_any_name_and_places_on_the_hub(empty, adapters, tmp_path, monkeypatch):
    """The hub's client is imitated by a folder laid out as the repository."""
    layers = random_layers({"proj_out": (32, 128)})
    folder = write(tmp_path / "snapshot", layers, lambda n: n)
    write(folder / "one", layers, lambda n: n)
    asked = []

    def snapshot_download(repository, **options):
        asked.append((repository, options.get("revision"), options["allow_patterns"], options.get("ignore_patterns")))
        return str(folder)

    monkeypatch.setattr("diffusionopd.models.lora_files.snapshot_download", snapshot_download)
    everything = ["*.safetensors", "*.json", "adapter_model.bin"]
    file = "my style.safetensors"
    for source, revision, patterns in (
        ("a/b", None, everything),
        (f"a/b/{file}", None, [file, f"{file}/*", "adapter_config.json"]),
        (f"a/b/one/{file}", None, [f"one/{file}", f"one/{file}/*", "one/adapter_config.json"]),
        ("a/b/one", None, ["one", "one/*", "adapter_config.json"]),
        ("a/b@v1", "v1", everything),
        ("a/b@refs/pr/1", "refs/pr/1", everything),
    ):
        assert_reads(source, empty, {"proj_out": delta(*layers["proj_out"])})
        assert asked.pop() == ("a/b", revision, patterns, ["*/*"] if patterns is everything else None)
    for place in ("run", ""):  # in the lora/ of a checkpoint, as in a local one
        adapters.save_peft("teacher_a", folder / place / "lora")
        assert load_lora(f"a/b/{place}").a.keys() == load_lora(folder / place).a.keys() != layers.keys()
    with pytest.raises(AdapterError, match="a/b has no .* 'Nobody/lora'"):
        load_lora("a/b/Nobody/lora")
    count = len(asked)
    for source in ("a/b/../../x", "a/b//etc"):
        with pytest.raises(AdapterError, match=source):
            load_lora(source)
    assert len(asked) == count
    write(folder, layers, lambda n: n, name="other.safetensors")
    shutil.rmtree(folder / "lora")
    with pytest.raises(AdapterError, match=r"my style\.safetensors, other\.safetensors"):
        load_lora(folder)
    (tmp_path / "a.ckpt").write_text("")
    with pytest.raises(AdapterError, match=r"a\.ckpt"):
        load_lora(tmp_path / "a.ckpt")


def test_every_lora_that_does_not_fit_is_named_before_weights_load(tiny_config, make_lora, tmp_path):
    config, good = tiny_config(), load_file(make_lora(3) / "adapter_model.safetensors")
    broken = {
        "blocks.30": {k.replace("blocks.3.", "blocks.30."): v for k, v in good.items()},
        "1.attn.to_q": {k: v for k, v in good.items() if "blocks.1.attn.to_q.lora_B" not in k},
        "0.attn.to_q": {k: torch.ones(v.shape[0], 7) if "0.attn.to_q.lora_A" in k else v for k, v in good.items()},
    }
    for owner, (module, tensors) in zip([config.train, *config.train.teachers], broken.items(), strict=True):
        owner["lora_path"] = str(tmp_path / f"{flat(module)}.safetensors")
        save_file(tensors, owner["lora_path"])
    with pytest.raises(ConfigError) as caught:
        check(config, 1)
    places = ("train.lora_path", "train.teachers[0].lora_path", "train.teachers[1].lora_path")
    for problem, place, module in zip(sorted(caught.value.problems), places, broken, strict=True):
        assert problem.startswith(place) and module in problem
    config = tiny_config()
    for end in ("attn.to_vv", "pos_embed.proj", "attn.norm_q"):  # there is none, a convolution, a norm
        config.train.lora_target_modules = ["attn.to_q", end]
        with pytest.raises(ConfigError, match=rf"train\.lora_target_modules.*{end}"):
            check(config, 1)
    for scale in (0, float("inf"), "1"):
        config.train.teachers[0]["scale"] = scale
        with pytest.raises(ConfigError, match="scale"):
            check(config, 1)


@pytest.mark.parametrize(
    ("trained_on", "origins", "differs"),
    [
        ("stabilityai/stable-diffusion-3-medium-diffusers", ["stabilityai/stable-diffusion-3.5-medium"], True),
        ("stabilityai/stable-diffusion-3-medium-diffusers", ["mirror/Stable-Diffusion-3-medium"], False),
        ("stabilityai/sd35", ["/data/sd35"], False),
        ("stabilityai/sd35", ["/cache/models--stabilityai--sd35/snapshots/0a1b"], False),
        ("stabilityai/sd35", ["/cache/models--stabilityai--sd3/snapshots/0a1b"], True),
        ("stabilityai/sd35", ["/data/base", "stabilityai/sd35"], False),
        ("stabilityai/sd35", ["/data/base", "stabilityai/sd3"], True),
        ("stabilityai/sd35", ["/data/base", ""], None),
        ("/home/someone/sd35", ["stabilityai/sd3"], False),
        ("", ["stabilityai/sd3"], False),
    ],
)  # fmt: skip
def test_another_base_is_told_where_names_can_be_compared(trained_on, origins, differs):
    assert is_of_another_base(trained_on, origins) is differs


def test_another_base_is_a_warning_or_a_note(adapters, tmp_path, tiny_config, pipeline_folder):
    adapters.save_peft("teacher_a", tmp_path, "owner/other")
    with pytest.warns(UserWarning, match="owner/other.*owner/base"):
        find_all({"t": str(tmp_path)}, "owner/base", None)
    config, model = tiny_config(), read_model(str(pipeline_folder))
    config.train.teachers[0]["lora_path"] = str(tmp_path)
    model = replace(model, configs={**model.configs, "text_encoder": {"_name_or_path": "owner/clip"}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert any("owner/other" in note for note in check(config, 1).notes)
        assert find_all({"t": str(tmp_path)}, "/somewhere/else", model)[2], "the name of an encoder says nothing"
