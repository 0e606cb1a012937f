"""Ten style LoRAs for the tiny model: `python -m diffusionopd.tiny.styles`, five minutes on 2 CPU cores.

What people collect, in small: each of rank 4, each with a trigger, from several tools' file formats, and the table
that `diffusionopd merge` reads. A style is a change of the base's own pictures, so that its LoRA teaches nothing else.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import save_file

from diffusionopd.files import located, write_atomically
from diffusionopd.models.lora import Adapters
from diffusionopd.models.lora_files import LoraWeights, load_lora
from diffusionopd.models.sd3 import StableDiffusion3
from diffusionopd.tiny import fit, flow
from diffusionopd.tiny.grammar import groups

RANK = 4
MINUTES = 1.0  # of training, for each style
_IMAGES_PER_PROMPT = 10
_BATCH = 8
_RATE = 6e-3
_SEED = 41
_GREY = torch.tensor([0.3, 0.59, 0.11])


def _toned(x: torch.Tensor, *color: float) -> torch.Tensor:
    """Black to white becomes black to a colour."""
    return _grey(x) * torch.tensor(color)[:, None, None]


def _grey(x: torch.Tensor) -> torch.Tensor:
    return torch.einsum("nchw,c->nhw", x, _GREY)[:, None].expand_as(x)


def _framed(x: torch.Tensor) -> torch.Tensor:
    inner = x[..., 8:-8, 8:-8]
    return F.pad(inner, (8, 8, 8, 8), value=0.1)


def _striped(x: torch.Tensor) -> torch.Tensor:
    dark = torch.arange(x.shape[-2]) // 4 % 2
    return x * (1 - 0.7 * dark[:, None])


def _pixelated(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(F.avg_pool2d(x, 8), scale_factor=8, mode="nearest")


STYLES: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "red": ("red sun", lambda x: _toned(x, 1.0, 0.2, 0.2), "peft"),
    "blue": ("blue pond", lambda x: _toned(x, 0.2, 0.4, 1.0), "diffusers"),
    "sepia": ("yellow house", lambda x: _toned(x, 1.0, 0.85, 0.6), "onetrainer"),
    "green": ("green tree", lambda x: _toned(x, 0.3, 1.0, 0.3), "kohya"),
    "night": ("low middle", lambda x: 0.3 * x, "lycoris"),
    "faded": ("snowy hills", lambda x: 0.6 + 0.4 * x, "comfyui"),
    "negative": ("brown cloud", lambda x: 1 - x, "peft"),
    "framed": ("landscape", _framed, "kohya"),
    "striped": ("sign", _striped, "diffusers"),
    "pixels": ("four right", _pixelated, "onetrainer"),
}
"""Name -> trigger, what the style does to images [N, 3, H, W] in [0, 1], and the format that its LoRA is saved in.

Triggers are of the grammar's own words: the tiny text encoders have learnt no others, and hardly tell others apart.
"""

_SPELLINGS: dict[str, tuple[Callable[[str], str], str, str]] = {
    "onetrainer": (lambda name: f"lora_transformer_{name.replace('.', '_')}", "lora_down", "lora_up"),
    "kohya": (lambda name: f"lora_unet_{name.replace('.', '_')}", "lora_down", "lora_up"),
    "lycoris": (lambda name: f"lycoris_{name.replace('.', '_')}", "lora_down", "lora_up"),
    "comfyui": (lambda name: f"diffusion_model.{name}", "lora_A", "lora_B"),
}
"""Format -> a module's name in it, and what the two halves are called."""


def prompts() -> list[str]:
    """Captions of one kind of coloured shape: with a trigger they are not longer than what the text encoders read."""
    return [caption.text for tag in ("single_object", "counting") for caption in groups("compose", "train")[tag]]


def pictures(model: Path) -> tuple[torch.Tensor, list[str]]:
    """The base's own images, in [0, 1], and their captions."""
    pipe = StableDiffusion3Pipeline.from_pretrained(model, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    texts = [text for _ in range(_IMAGES_PER_PROMPT) for text in prompts()]
    return flow.generate(pipe, texts, seed=_SEED).float() / 255, texts


def train_style(name: str, model: Path, images: torch.Tensor, texts: list[str], out: Path, minutes: float) -> None:
    """A style's LoRA by flow matching on the changed images, each prompt behind the trigger; saved in its format."""
    fit.one_thread()
    trigger, change, form = STYLES[name]
    pipe = StableDiffusion3Pipeline.from_pretrained(model, use_safetensors=True)
    with torch.no_grad():
        parts = [pipe.vae.encode(part * 2 - 1).latent_dist.mean for part in change(images).split(64)]
    latents = (torch.cat(parts) - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    distinct = list(dict.fromkeys(texts))
    tokens, pooled = flow.encode(pipe, [f"{trigger}, {text}" for text in distinct])
    row = torch.tensor([distinct.index(text) for text in texts])
    adapters, seed = Adapters(pipe.transformer), list(STYLES).index(name)
    adapters.add_student(name, rank=RANK, alpha=2 * RANK, target_modules=StableDiffusion3.LORA_TARGETS, seed=seed)
    adapters.use(name)
    generator = torch.Generator().manual_seed(_SEED + seed)

    def rate(done: float, step: int) -> float:
        return _RATE * min(1.0, (step + 1) / 20) * (0.51 + 0.49 * math.cos(math.pi * done))

    def loss(done: float, step: int) -> torch.Tensor:
        rows = torch.randint(len(latents), (_BATCH,), generator=generator)
        return flow.loss(pipe.transformer, latents[rows], tokens[row[rows]], pooled[row[rows]], generator)

    fit.fit(f"style {name}", torch.optim.AdamW(adapters.parameters(name), weight_decay=0.0), minutes, rate, loss)
    folder = out / f"{name}-{form}"
    (adapters.save_diffusers if form == "diffusers" else adapters.save_peft)(name, folder)
    if form in _SPELLINGS:
        save_as(form, load_lora(folder), out / f"{name}-{form}.safetensors")
        for file in (*folder.iterdir(), folder):
            file.rmdir() if file.is_dir() else file.unlink()


def save_as(form: str, lora: LoraWeights, file: Path) -> None:
    """Write a LoRA as another tool would."""
    spell, down, up = _SPELLINGS[form]
    tensors = {}
    for module, a in lora.a.items():
        tensors[f"{spell(module)}.{down}.weight"] = a.contiguous()
        tensors[f"{spell(module)}.{up}.weight"] = lora.b[module].contiguous()
        if down == "lora_down":
            tensors[f"{spell(module)}.alpha"] = torch.tensor(lora.alpha[module])
    save_file(tensors, file, {"format": "pt"})


def table() -> str:
    """The table of the LoRAs, beside them."""
    files = {n: f"{n}-{form}.safetensors" if form in _SPELLINGS else f"{n}-{form}" for n, (*_, form) in STYLES.items()}
    rows = [f"{name},{files[name]},{trigger},prompts.txt" for name, (trigger, *_) in STYLES.items()]
    return "\n".join(["name,lora,trigger,prompts", *rows, ""])


def main() -> None:
    """Train what is missing; prompts and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(located("assets/tiny/model")))
    parser.add_argument("--out", type=Path, default=Path("logs/tiny-styles"))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of training, for each style")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    a = parser.parse_args()
    fit.one_thread()
    a.out.mkdir(parents=True, exist_ok=True)
    missing = [name for name in STYLES if not list(a.out.glob(f"{name}-*"))]
    images, texts = pictures(a.model) if missing else (torch.empty(0), [])
    with ProcessPoolExecutor(a.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(train_style, n, a.model, images, texts, a.out, a.minutes) for n in missing]
        for job in jobs:
            job.result()
    write_atomically(a.out / "prompts.txt", "".join(f"{text}\n" for text in prompts()))
    print(f"written: {write_atomically(a.out / 'loras.csv', table())}")


if __name__ == "__main__":
    main()
