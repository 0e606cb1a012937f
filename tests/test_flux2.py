"""FLUX.2-dev, whose guidance is an input and whose tokenizer is a processor's."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from transformers import AutoTokenizer

from diffusionopd.models.backbone import load_text_encoder
from diffusionopd.models.conditions import Conditions

from .families.common import PROMPTS
from .families.flux2 import DEV
from .test_families import Small, far


def test_dev_is_the_stock_pipeline_with_its_processors_tokenizer(tmp_path):
    """PixtralProcessor needs torchvision, texts its tokenizer alone."""
    DEV.build(tmp_path)
    rows = load_text_encoder(str(tmp_path), max_sequence_length=DEV.length)(PROMPTS)
    small = Small(DEV, tmp_path, rows, Conditions.of(rows[:1]))
    pipe, backbone = DiffusionPipeline.from_pretrained(tmp_path, tokenizer=None), small.backbone()
    pipe.tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    with torch.no_grad():
        found = [small.sample(backbone, guidance) for guidance in DEV.guidances]
        stock = [small.stock(pipe, backbone, guidance) for guidance in DEV.guidances]
    assert max(map(far, found, stock)) < 1e-5 < 1e-2 < far(*found)
    assert backbone.evaluations == 2 * 2 * 5
