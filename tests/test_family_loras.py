"""LoRAs with the names of the families' original codes, as kohya's and ComfyUI's files have them."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2KleinPipeline, FluxPipeline, QwenImagePipeline, ZImagePipeline
from diffusers.loaders import single_file_utils
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from diffusionopd.models.flux1 import Flux1
from diffusionopd.models.flux2 import Flux2
from diffusionopd.models.loading import load_backbone, read_model
from diffusionopd.models.lora import Adapters
from diffusionopd.models.lora_files import AdapterError, load_lora
from diffusionopd.models.lora_fit import fit, linear_layers
from diffusionopd.models.z_image import ZImage

from .families import CASES
from .test_lora_files import AB, assert_reads, delta, flat, random_layers, write

EMBEDDINGS = ("img_in", "txt_in", *(f"{part}_in.{end}_layer" for part in ("time", "guidance") for end in ("in", "out")))
SIDES = ("img", "txt")
WIDTH = 3072  # diffusers knows no other for FLUX.1
FLUX1 = {
    **dict.fromkeys((*EMBEDDINGS, "vector_in.in_layer", "vector_in.out_layer"), 1),
    **{
        f"double_blocks.0.{side}_{name}": size
        for side in SIDES
        for name, size in (("attn.qkv", 3), ("attn.proj", 1), ("mlp.0", 4), ("mlp.2", 1), ("mod.lin", 6))
    },
    "single_blocks.0.linear1": 7, "single_blocks.0.linear2": 1, "single_blocks.0.modulation.lin": 3,
    "final_layer.linear": 1, "final_layer.adaLN_modulation.1": 2,
}  # fmt: skip
FLUX2 = {
    **dict.fromkeys(EMBEDDINGS, 1),
    **{
        f"double_blocks.0.{side}_{name}": size
        for side in SIDES
        for name, size in (("attn.qkv", 3), ("attn.proj", 1), ("mlp.0", 6), ("mlp.2", 1))
    },
    **{f"double_stream_modulation_{side}.lin": 6 for side in SIDES}, "single_stream_modulation.lin": 3,
    "single_blocks.0.linear1": 9, "single_blocks.0.linear2": 1,
    "final_layer.linear": 1, "final_layer.adaLN_modulation.1": 2,
}  # fmt: skip
Z_IMAGE = {
    **{
        f"{blocks}.0.{name}": size
        for blocks in ("layers", "noise_refiner", "context_refiner")
        for name, size in (("attention.qkv", 3), ("attention.out", 1))
    },
    "x_embedder": 1, "final_layer.linear": 1, "final_layer.adaLN_modulation.1": 1,
}  # fmt: skip
NORMS = [
    *(f"double_blocks.0.{side}_attn.norm.{name}_norm.scale" for side in SIDES for name in ("query", "key")),
    *(f"single_blocks.0.norm.{name}_norm.scale" for name in ("query", "key")),
]


@pytest.mark.parametrize(
    ("family", "layers", "convert"),
    [
        (Flux1, FLUX1, single_file_utils.convert_flux_transformer_checkpoint_to_diffusers),
        (Flux2, FLUX2, single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers),
        (ZImage, Z_IMAGE, single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers),
    ],
)
def test_layers_of_the_original_code_are_those_of_diffusers_converter(family, layers, convert):
    """Matrices of one column through the converter of whole models."""
    matrices = {name: torch.randn(size * WIDTH, 1) for name, size in layers.items()}
    given = {f"{name}.weight": matrix for name, matrix in matrices.items()}
    if family is not ZImage:
        given |= {f"{name}.bias": torch.zeros(len(matrix)) for name, matrix in matrices.items()}
        given |= {name: torch.zeros(1) for name in NORMS}
    converted = {n.removesuffix(".weight"): t for n, t in convert(given).items() if t.ndim == 2}
    ours = family.lora_layers({name: tuple(tensor.shape) for name, tensor in converted.items()})
    assert ours.keys() == {flat(name) for name in layers}
    found = {name: rows for layer, matrix in matrices.items() for name, rows in ours[flat(layer)](matrix).items()}
    assert found.keys() == converted.keys() and all(torch.equal(found[name], converted[name]) for name in found)


TOOLS = {"kohya": (lambda n: f"lora_unet_{flat(n)}", {}), "ComfyUI": ("diffusion_model.{}".format, AB)}
PUBLISHED_FOR_QWEN = {
    "lightx2v": (str, {}),
    "ComfyUI with alphas": ("diffusion_model.{}".format, {}),
    "DiffSynth": (str, AB | {"down": "lora_A.default", "up": "lora_B.default"}),
    "diffusers": ("transformer.{}".format, AB),
}
"""Tool -> a module's name there, and how its files are otherwise."""
IN_BLOCKS = {
    "qwen_image": (QwenImagePipeline, None),  # all that it has
    "flux1": (FluxPipeline, ("double_blocks.1.img_attn.qkv", "double_blocks.0.txt_mlp.2", "single_blocks.1.linear2")),
    "flux2": (Flux2KleinPipeline, ("double_blocks.1.img_attn.qkv", "single_blocks.1.linear1")),
    "z_image": (
        ZImagePipeline,
        ("layers.1.attention.to_k", "noise_refiner.0.feed_forward.w1", "layers.0.attention.qkv"),
    ),
}


@pytest.mark.parametrize("case", IN_BLOCKS)
def test_a_file_adds_what_the_stock_pipelines_reader_makes_of_it(case, tmp_path):
    """kohya's with alphas, and the same as ComfyUI and, for Qwen-Image, others have it."""
    CASES[case].build(tmp_path / "model")
    model, (pipeline, names) = read_model(str(tmp_path / "model")), IN_BLOCKS[case]
    empty = model.empty_transformer()
    modules, shapes = linear_layers(empty), {}
    ours = model.family.lora_layers(modules)
    for name in names or modules:
        parts = list(ours[flat(name)](torch.zeros(0))) if flat(name) in ours else [name]
        shapes[name] = sum(modules[part][0] for part in parts), modules[parts[0]][1]
    layers, of_qwen = random_layers(shapes), case == "qwen_image"
    for tool, (key, options) in (TOOLS | (PUBLISHED_FOR_QWEN if of_qwen else {})).items():
        folder = write(tmp_path / tool, layers, key, **options)
        if tool == "kohya" or of_qwen:
            state = pipeline.lora_state_dict(folder, weight_name="my style.safetensors")
            ends = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
            expected = {
                end.removeprefix("transformer."): delta(state[f"{end}.lora_A.weight"], state[f"{end}.lora_B.weight"])
                for end in ends
            }
        assert_reads(folder, empty, expected)
    narrow = write(tmp_path / "narrow", {name: (torch.ones(3, 3), torch.ones(3, 3), 3)}, "diffusion_model.{}".format)
    with pytest.raises(AdapterError):
        fit(load_lora(narrow), empty)


def test_a_layer_whose_name_ends_others_is_adapted_by_itself(tmp_path):
    """FLUX.1's proj_out, beside those of its single blocks or without: here, saved, and read again by others."""

    def empty():
        return load_backbone(str(tmp_path / "model")).transformer

    def added(transformer, name):
        layers = (layer for layer in transformer.named_modules() if isinstance(layer[1], LoraLayer))
        return {module.removeprefix("base_model.model."): layer.get_delta_weight(name) for module, layer in layers}

    def diffusers(transformer):
        tensors, metadata = FluxPipeline.lora_state_dict(str(tmp_path / "diffusers"), return_lora_metadata=True)
        FluxPipeline.load_lora_into_transformer(tensors, None, transformer, "default", metadata)
        return transformer

    CASES["flux1"].build(tmp_path / "model")
    shapes = linear_layers(empty())
    for names in (shapes, [name for name in shapes if ".attn." in name or name == "proj_out"]):
        layers = random_layers({name: shapes[name] for name in sorted(names)})
        adapters = Adapters(empty())
        adapters.add_from("student", write(tmp_path / "lora", layers, str))
        adapters.save_peft("student", tmp_path / "peft")
        adapters.save_diffusers("student", tmp_path / "diffusers")
        for transformer, adapter in (
            (adapters.transformer, "student"),
            (PeftModel.from_pretrained(empty(), tmp_path / "peft"), "default"),
            (diffusers(empty()), "default"),
        ):
            found = added(transformer, adapter)
            assert found.keys() == layers.keys()
            for name, layer in layers.items():
                torch.testing.assert_close(found[name].double(), delta(*layer), rtol=1e-4, atol=1e-6)
        for folder in ("peft", "diffusers"):
            assert_reads(tmp_path / folder, empty(), {name: delta(*layer) for name, layer in layers.items()})
