"""What can be downloaded: sources, destinations, digests, licences. Data only.

Digests and sizes are as of 2026-11, of the files of Flow-GRPO's evaluations and of the weights that scorers were
checked with. Hub files need none here: the hub states the SHA-256 of a large file when it sends it.
"""

from __future__ import annotations

from dataclasses import dataclass

GITHUB = "https://raw.githubusercontent.com/"
HUB = "hub:"
"""`hub:owner/name/path` is a file of a model repository on the Hugging Face hub; `transfer.resolve` makes it a URL."""


@dataclass(frozen=True)
class File:
    """One file: where it comes from and where it belongs."""

    path: str  # relative to the repository's root
    urls: tuple[str, ...]  # the first that has it is taken
    sha256: str = ""  # of the file at `path`; only its first digits where no more are published
    size: int = 0  # bytes of the file at `path`, where known
    extract: bool = False  # only UnifiedReward's question is kept of the source, see `files.question`


@dataclass(frozen=True)
class Repository:
    """The files of a hub repository that are needed; they go into the hub's own cache."""

    name: str
    patterns: tuple[str, ...]
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """What one name on the command line stands for."""

    parts: tuple[File | Repository, ...]
    note: str  # source and licence


# --- prompts ---------------------------------------------------------------------------------------------------------

FLOW_GRPO = f"{GITHUB}yifan123/flow_grpo/94e23ee5405ab7241fc1f75d30cac8147e2b1f53/"


def _prompts(path: str, size: int = 0, sha256: str = "") -> File:
    return File(f"dataset/{path}", (f"{FLOW_GRPO}dataset/{path}",), sha256, size)


DATASETS = {
    "geneval": Item(
        (
            _prompts("geneval/train_metadata.jsonl"),
            _prompts(
                "geneval/test_metadata.jsonl",
                340_835,
                "cec4b24b9fee7bac21c8f787054ecc8dc9ff831674037713a4cd35e0f0a74a28",
            ),
        ),
        "Flow-GRPO (MIT): 50,000 prompts of GenEval's grammar; 553 test prompts, four times each",
    ),
    "ocr": Item(
        (
            _prompts("ocr/train.txt"),
            _prompts("ocr/test.txt", 217_565, "4dd8caf3ab6ade73bd376c7d14c6ca49b6eacfb1bd321e22c40714ae4a98d4dc"),
        ),
        "Flow-GRPO (MIT): about 20,000 scenes with text in quotes; 1,018 for testing",
    ),
    "pickscore": Item(
        (
            _prompts("pickscore/train.txt"),
            _prompts("pickscore/test.txt", 239_891, "d75c025fa451866e70f7e36243f7cdd93095523cb51f5f9651f2ce3236d20262"),
        ),
        "Flow-GRPO (MIT): prompts of Pick-a-Pic, written by users and unfiltered; 2,048 for testing",
    ),
    "drawbench": Item(
        (_prompts("drawbench/test.txt", 65_164, "9006b98feabb94b28a2bc0c88de42fd4f31a9ec3c2a19e308a02c5385b7172f0"),),
        "Flow-GRPO (MIT): DrawBench, 1,000 lines, test only",
    ),
}

# --- models ----------------------------------------------------------------------------------------------------------

_CONFIG = ("*.json", "*.txt")
_CLIP_L = Repository("openai/clip-vit-large-patch14", (*_CONFIG, "model.safetensors"))
_CLIP_H = Repository("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", _CONFIG)
_PICKSCORE = Repository("yuvalkirstain/PickScore_v1", (*_CONFIG, "model.safetensors"))
_BERT = Repository("bert-base-uncased", ("config.json", "tokenizer*", "vocab.txt"))
_MASK2FORMER = Repository("facebook/mask2former-swin-small-coco-instance", (*_CONFIG, "model.safetensors"))
# A pipeline's folders without the fp16 variants and without the single-file copies beside them.
_SD35 = Repository(
    "stabilityai/stable-diffusion-3.5-medium",
    ("model_index.json", "scheduler/*", "text_encoder*/*", "tokenizer*/*", "transformer/*", "vae/*"),
    ("*fp16*", "text_encoders/*"),
)
_LORAS = Repository("quanhaol/DiffusionOPD", ("*/lora/*",))

MODELS = {
    "sd3.5-medium": Item((_SD35,), "the base model; Stability AI Community License, to be accepted on the hub first"),
    "loras": Item((_LORAS,), "the released teachers and student; terms on the hub"),
    "clip-l": Item((_CLIP_L,), "OpenAI, MIT: clipscore, aesthetic, geneval"),
    "clip-h": Item((_CLIP_H,), "LAION, MIT: tokenizer of pickscore and hpsv2"),
    "pickscore": Item((_PICKSCORE,), "Kirstain et al., arXiv 2305.01569: pickscore; terms on the hub"),
    "bert": Item((_BERT,), "Google, Apache-2.0: tokenizer of imagereward"),
    "mask2former": Item((_MASK2FORMER,), "another training than GenEval's detector; terms on the hub"),
}

# --- scorers ---------------------------------------------------------------------------------------------------------

_MMDET = "https://download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco/"
_DETECTOR = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
_QUESTION_SOURCES = (
    f"{FLOW_GRPO}flow_grpo/rewards.py",  # quotes the client of the authors, which is the second source
    f"{GITHUB}CodeGoat24/UnifiedReward/030998295ce601e0a0884e506040b2724d63b6d4/sglang_llava/sglang_inference.py",
)

REWARDS = {
    "aesthetic": Item(
        (
            File(
                "reward_ckpts/sac+logos+ava1-l14-linearMSE.pth",
                (f"{GITHUB}christophschuhmann/improved-aesthetic-predictor/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",),
                "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
                3_714_759,
            ),
            _CLIP_L,
        ),
        "LAION's improved aesthetic predictor, Apache-2.0",
    ),
    "clipscore": Item((_CLIP_L,), "OpenAI, MIT"),
    "geneval": Item(
        # The name of the file ends in the first digits of its SHA-256, as all of OpenMMLab's do.
        (File(f"reward_ckpts/{_DETECTOR}", (f"{_MMDET}{_DETECTOR}",), "743b7d99"), _CLIP_L),
        "the detector of GenEval, by OpenMMLab, Apache-2.0",
    ),
    "hpsv2": Item(
        (File("reward_ckpts/HPS_v2.1_compressed.pt", (f"{HUB}xswu/HPSv2/HPS_v2.1_compressed.pt",)), _CLIP_H),
        "Wu et al., arXiv 2306.09341, Apache-2.0",
    ),
    "imagereward": Item(
        # The organisation has been renamed; its old name is the second source.
        (
            File(
                "reward_ckpts/ImageReward.pt",
                (f"{HUB}zai-org/ImageReward/ImageReward.pt", f"{HUB}THUDM/ImageReward/ImageReward.pt"),
            ),
            _BERT,
        ),
        "Xu et al., arXiv 2304.05977, Apache-2.0",
    ),
    "pickscore": Item((_PICKSCORE, _CLIP_H), "Kirstain et al., arXiv 2305.01569; terms on the hub"),
    "unifiedreward": Item(
        (
            File(
                "reward_ckpts/unifiedreward_question.txt",
                _QUESTION_SOURCES,
                "1741e3ed294bd38333a1ac67005c8ac7919769f417f3fdc8940d5eb3ca099f54",
                636,
                extract=True,
            ),
        ),
        "the question of Wang et al., arXiv 2503.05236; its model runs in a server of its own",
    ),
}

CATALOGUE: dict[str, dict[str, Item]] = {"datasets": DATASETS, "rewards": REWARDS, "models": MODELS}
