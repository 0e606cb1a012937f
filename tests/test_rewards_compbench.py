"""T2I-CompBench's rewards against its own steps, on tiny random weights and hand-made detections and parses."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPModel,
    CLIPTokenizer,
    Owlv2Config,
    Owlv2ForObjectDetection,
)

from diffusionopd.rewards import RewardError, UnfitPromptError, check_prompts
from diffusionopd.rewards.clip import Clip
from diffusionopd.rewards.compbench import blip_vqa, phrases, scorers
from diffusionopd.rewards.compbench import spatial as spatial_module
from diffusionopd.rewards.compbench.phrases import RELATIONS, Spatial, noun_phrases, spatial
from diffusionopd.rewards.compbench.scorers import Attribute, Complex, NonSpatial, SpatialRelation
from diffusionopd.rewards.compbench.spatial import Found, frame_scale, load_detector, position_score, spatial_score
from diffusionopd.rewards.hpsv2 import to_transformers
from diffusionopd.tiny.models import clip_tokenizer

from .helpers_rewards import (
    MEAN,
    OPEN_CLIP,
    STD,
    assert_same_on_a_gpu,
    incomplete,
    open_clip_state,
    save_byte_tokenizer,
    smooth_images,
)

PUBLISHED = blip_vqa.VISION, blip_vqa.TEXT, scorers.CLIP_B_CONFIG
SIDE, WIDTH = 48, 32
WORDS = ["a", "red", "blue", "hat", "bench", "yes", "no", "?", "of", "the"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
PROMPTS = ["a red hat", "a blue bench and a red hat", "the hat."]
PHRASES = {PROMPTS[0]: ["a red hat"], PROMPTS[1]: ["a blue bench", "a red hat", "top"], PROMPTS[2]: ["The Hat (of)!"]}


# ---- a stand-in of spaCy ---------------------------------------------------------------------------------------------

TAGS = {"cat": "NOUN", "dog": "NOUN", "hat": "NOUN", "bench": "NOUN", "girl": "NOUN", "Rome": "PROPN", "red": "ADJ",
        "blue": "ADJ", "fluffy": "ADJ", "Leaning": "PROPN", "Tower": "PROPN"}  # fmt: skip


class Doc(list):
    """Tokens with a text and a part of speech; a slice has the text of its words."""

    @property
    def text(self):
        return " ".join(token.text for token in self)

    def __getitem__(self, key):
        return Doc(super().__getitem__(key)) if isinstance(key, slice) else super().__getitem__(key)


def parse(prompt: str) -> Doc:
    words = re.findall(r"\w+|[^\w\s]", prompt)
    doc = Doc(SimpleNamespace(text=word, pos_=TAGS.get(word, "ADP")) for word in words)
    doc.noun_chunks = [SimpleNamespace(text=text) for text in PHRASES.get(prompt, [])]
    return doc


@pytest.fixture(autouse=True)
def parser(monkeypatch):
    for module in (phrases, scorers):
        monkeypatch.setattr(module, "load_parser", lambda: parse)


def test_objects_and_relation_of_a_prompt():
    simple = {
        "a cat on the top of a dog": ("cat", "dog", "on the top of"),
        "a girl next to a hat": ("person", "hat", "next to"), "a cat": ("cat", "cat", None), "red": (None, None, None),
    }  # fmt: skip
    assert {text: spatial(text) for text in simple} == {text: Spatial(*wanted) for text, wanted in simple.items()}
    around = {
        "The red hat was on top of the blue bench .": ("hat", "bench", "on top of"),
        "The fluffy cat is on the left of the dog .": ("cat", "dog", "on the left of"),
        "A girl near the Leaning Tower today": ("person", "Tower", "near"),
        "cat near dog next to hat": (None, None, "next to"),  # four objects: none
        "The cat sleeps": (None, None, None),
    }
    found = {text: spatial(text, is_complex=True) for text in around}
    assert found == {text: Spatial(*wanted) for text, wanted in around.items()}
    assert phrases.without_adjectives("The fluffy cat , red") == "The cat ,"
    assert noun_phrases(PROMPTS[1]) == ["a blue bench", "a red hat"], "top is no thing"
    with pytest.raises(UnfitPromptError, match="noun phrase"):
        noun_phrases("red")


def test_without_spacy_the_commands_are_named(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(RewardError, match=r"pip install -e '\.\[compbench\]' && pip install https://\S+en_core_web_sm"):
        phrases.load_parser()
    found = check_prompts(["compbench_attribute", "compbench_spatial"], ["red", "red near blue"], [{}] * 2)
    assert list(found) == [0], "what needs no parser"


# ---- attributes ------------------------------------------------------------------------------------------------------


def to_blip(name: str) -> str:
    """The name of a tensor in BLIP's own code."""
    for new, old in {
        "vision_model.embeddings.class_embedding": "visual_encoder.cls_token",
        "vision_model.embeddings.position_embedding": "visual_encoder.pos_embed",
        "vision_model.embeddings.patch_embedding": "visual_encoder.patch_embed.proj",
        "vision_model.post_layernorm": "visual_encoder.norm", "vision_model.encoder.layers": "visual_encoder.blocks",
        "self_attn.qkv": "attn.qkv", "self_attn.projection": "attn.proj", "layer_norm": "norm",
    }.items():  # fmt: skip
        name = name.replace(new, old)
    return name


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """transformers' own BLIP for answers, its weights in BLIP's names, and `Attribute` of them."""
    torch.manual_seed(0)
    path, shape = tmp_path_factory.mktemp("blip"), {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = BlipVisionConfig(**shape, image_size=SIDE, patch_size=16, layer_norm_eps=1e-6)
    size = len(VOCABULARY) + 2
    text = BlipTextConfig(**shape, encoder_hidden_size=WIDTH, vocab_size=size, max_position_embeddings=64)
    model = BlipForQuestionAnswering(BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    state = {to_blip(name): value.clone() for name, value in model.state_dict().items()}
    state |= {f"text_{part}.embeddings.position_ids": torch.arange(64)[None] for part in ("encoder", "decoder.bert")}
    torch.save({"model": state}, path / "blip.pth")
    BertTokenizer(vocab={token: i for i, token in enumerate(VOCABULARY)}).save_pretrained(path / "tokenizer")
    files = {"checkpoint": str(path / "blip.pth"), "tokenizer": str(path / "tokenizer")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blip_vqa, "VISION", vision)
        patch.setattr(blip_vqa, "TEXT", text)
        yield model, files, state
    blip_vqa.load_blip_vqa.cache_clear()


@torch.no_grad()
def official_attribute(model, image: Image.Image, questions: list[str]) -> float:
    """`BLIP_vqa.py` and `vqa_prob`: one question after the other, each to four decimals, and their product."""
    reward = 1.0
    for question in questions:
        question = re.sub(r"([.!\"()*#:;~])", "", question.lower()).rstrip(" ")
        resized = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        pixels = (np.asarray(resized, dtype=np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
        patches = model.vision_model(torch.from_numpy(pixels).permute(2, 0, 1)[None].float()).last_hidden_state
        words = re.findall(r"\w+|\?", question)
        ids = torch.tensor([[len(VOCABULARY) + 1, *(VOCABULARY.index(w) for w in words), VOCABULARY.index("[SEP]")]])
        states = model.text_encoder(ids, encoder_hidden_states=patches, return_dict=True).last_hidden_state
        start = torch.tensor([[len(VOCABULARY)]])
        logits = model.text_decoder(start, encoder_hidden_states=states, return_dict=True).logits[0, 0]
        probabilities = logits.softmax(dim=-1)
        yes, no = (probabilities[VOCABULARY.index(word)] for word in ("yes", "no"))
        reward *= float(f"{yes / (yes + no):.4f}")
    return float(f"{reward:.4f}")


@pytest.mark.parametrize("size", [(48, 48), (64, 64), (70, 40)])
def test_attribute_is_the_official_score(blip, size):
    model, files, _ = blip
    images = smooth_images(*size)
    asked = [[f"{each}?" for each in noun_phrases(prompt)] for prompt in PROMPTS]
    wanted = [official_attribute(model, *pair) for pair in zip(images, asked, strict=True)]
    scorer = Attribute(**files)
    scores = scorer.score(images, PROMPTS, [{}] * 3)
    np.testing.assert_allclose(scores["compbench_attribute"], wanted, atol=1.01e-4)
    assert np.ptp(wanted) > 0.05 and scores["compbench_attribute"].dtype == np.float64
    assert scorer.score([], [], [])["compbench_attribute"].shape == (0,)


@pytest.mark.gpu
def test_scores_on_a_gpu_are_those_on_a_cpu(blip):
    assert_same_on_a_gpu(lambda **given: Attribute(**blip[1] | given), "compbench_attribute", PROMPTS, atol=1e-3)


def test_the_configuration_has_the_published_sizes():
    vision, text, _ = PUBLISHED
    for config in (vision, text):
        assert (config.hidden_size, config.intermediate_size) == (768, 3072)
        assert (config.num_hidden_layers, config.num_attention_heads) == (12, 12)
    assert (vision.image_size, vision.patch_size, vision.layer_norm_eps) == (480, 16, 1e-6)
    assert (text.vocab_size, text.encoder_hidden_size, text.layer_norm_eps) == (30524, 768, 1e-12)


def test_another_checkpoint_is_refused_and_questions_are_cut_as_blip_cuts_them(blip, tmp_path):
    _, files, state = blip
    torch.save({"model": {k: v for k, v in state.items() if "norm1" not in k}}, tmp_path / "other.pth")
    with pytest.raises(RewardError, match=r"(?s)not the checkpoint.*layer_norm1.*tools\.download"):
        Attribute(**files | {"checkpoint": str(tmp_path / "other.pth")})
    assert blip_vqa.clean_question('A "Red" Hat: (big)~ ') == "a red hat big"
    assert len(blip_vqa.clean_question("w " * 60).split(" ")) == 50
    assert check_prompts(["compbench_attribute"], [PROMPTS[0], "red"], [{}] * 2).keys() == {1}


# ---- spatial relations -----------------------------------------------------------------------------------------------


def official_position(locality, a, b, iou_threshold=0.1, distance_threshold=150):
    """`determine_position`, written out: boxes are (x_min, y_min, x_max, y_max)."""
    x = (b[0] + b[2]) / 2 - (a[0] + a[2]) / 2
    y = (b[1] + b[3]) / 2 - (a[1] + a[3]) / 2
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    iou = inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)
    soft = 1 if iou < iou_threshold else iou_threshold / iou
    if locality in ["next to", "on side of", "near"]:
        if abs(x) < distance_threshold or abs(y) < distance_threshold:
            return 1
        return distance_threshold / max(abs(x), abs(y))
    if locality == "on the right of" and x < 0 and abs(x) > abs(y):
        return soft
    if locality == "on the left of" and x > 0 and abs(x) > abs(y):
        return soft
    if locality == "on the bottom of" and y < 0 and abs(y) > abs(x):
        return soft
    if locality == "on the top of" and y > 0 and abs(y) > abs(x):
        return soft
    return 0


def test_positions_are_scored_as_officially():
    rng, seen = np.random.default_rng(0), set()
    for _ in range(400):
        boxes = []
        for _ in range(2):
            left, top = rng.uniform(0, 420, 2)
            boxes.append((left, top, left + rng.uniform(5, 200), top + rng.uniform(5, 200)))
        for relation in (*RELATIONS, None):
            wanted = official_position(relation, *boxes)
            first, second = (Found(box, 0.5) for box in boxes)
            assert math.isclose(position_score(relation, first, second), wanted)
            seen.add((relation, wanted > 0, 0 < wanted < 1))
    assert len(seen) > 2 * len(RELATIONS)
    assert frame_scale(512, 512) == 479 / 512 and frame_scale(256, 512) == 480 / 512


def test_a_spatial_score_needs_both_objects_and_a_half():
    left, right = Found((0, 0, 10, 10), 0.9), Found((50, 0, 60, 10), 0.3)
    asked = Spatial("cat", "dog", "on the left of")
    assert math.isclose(spatial_score(asked, {"cat": left, "dog": right}), 0.25 * 1.2 + 0.5)
    assert spatial_score(Spatial("cat", "dog", "on the right of"), {"cat": left, "dog": right}) == 0.0  # 0.3
    assert spatial_score(asked, {"cat": left}) == spatial_score(asked, {}) == 0.0
    assert spatial_score(Spatial(None, None, "near"), {"cat": left}) == 0.0
    prompts = ["a cat", "a cat near a dog", "Rome near the Leaning Tower"]
    assert list(check_prompts(["compbench_spatial"], prompts, [{}] * 3)) == [0, 2]


@pytest.fixture(scope="module")
def owl(tmp_path_factory) -> str:
    """An OWLv2 of random weights in the hub's format."""
    torch.manual_seed(0)
    vocabulary = dict(sorted(clip_tokenizer("<|endoftext|>").get_vocab().items(), key=lambda item: item[1]))
    vocabulary = {token: i for i, token in enumerate(["unused", *vocabulary])}  # a query that begins with 0 is none
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shape, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Owlv2Config(text_config=text, vision_config={**shape, "image_size": 64, "patch_size": 16},
                         projection_dim=32)  # fmt: skip
    path = tmp_path_factory.mktemp("owl")
    Owlv2ForObjectDetection(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_a_detector_finds_the_best_box_of_each_name(owl, monkeypatch, tmp_path):
    """As transformers' own way from the model's output to boxes."""
    monkeypatch.setattr(spatial_module, "THRESHOLD", 0.0)  # random weights are not sure of anything
    pytest.importorskip("scipy")
    with pytest.warns(UserWarning, match="not comparable"):
        scorer = SpatialRelation(detector=owl)
    detect, pixels = scorer.detect, np.asarray(smooth_images(64, 64, 1)[0])
    found = detect(pixels, ["cat", "dog", "cat"])
    model, processor, tokenizer = detect.args
    with torch.no_grad():
        words = tokenizer(["cat", "dog"], padding="max_length", max_length=16, return_tensors="pt")
        image = processor(images=[Image.fromarray(pixels)], return_tensors="pt")
        output = model(**image, **words)
    (wanted,) = processor.post_process_object_detection(output, 0.0, [(479, 479)])
    assert len(wanted["scores"]) and found.keys() == {["cat", "dog"][i] for i in wanted["labels"].tolist()}
    for i, name in enumerate(("cat", "dog")):
        own = wanted["labels"] == i
        if own.any():
            best = int(wanted["scores"][own].argmax())
            assert math.isclose(found[name].score, float(wanted["scores"][own][best]), abs_tol=1e-6)
            np.testing.assert_allclose(found[name].box, wanted["boxes"][own][best], atol=1e-3)
    scores = scorer.score(pixels[None], ["a cat near a dog"], [{}])
    assert list(scores) == ["compbench_spatial"] and 0 <= scores["compbench_spatial"][0] <= 1
    for name, fact in (("nobody/none", "hf download nobody/none"), (incomplete(owl, tmp_path / "owl"), "owl.*weight")):
        with pytest.raises(RewardError, match=fact), pytest.warns(UserWarning):
            load_detector(name, "cpu", "float32")


# ---- other relations, and complex prompts ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_b(tmp_path_factory):
    """The file of a tiny CLIP in open_clip's names, its tokenizer, and the same CLIP."""
    path, state = tmp_path_factory.mktemp("clip"), open_clip_state()
    save_file({name: value.contiguous() for name, value in state.items()}, path / "b.safetensors")
    files = {"checkpoint": str(path / "b.safetensors"), "tokenizer": save_byte_tokenizer(path / "tokenizer")}
    model = CLIPModel(OPEN_CLIP).eval()
    model.load_state_dict(to_transformers(state))  # test_rewards_hpsv2.py proves it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorers, "CLIP_B_CONFIG", OPEN_CLIP)
        yield files, Clip(model, CLIPTokenizer.from_pretrained(files["tokenizer"]))
    scorers.load_clip_b.cache_clear()


def test_nonspatial_is_the_cosine_of_clip(clip_b):
    (files, clip), images = clip_b, smooth_images(40, 56)
    scores = NonSpatial(**files).score(images, PROMPTS, [{}] * 3)
    np.testing.assert_allclose(scores["compbench_nonspatial"], clip.cosine(images, PROMPTS), atol=1e-5)
    text, vision = PUBLISHED[2].text_config, PUBLISHED[2].vision_config
    assert (text.hidden_size, text.num_attention_heads, text.hidden_act) == (512, 512 // 64, "quick_gelu")
    assert (vision.hidden_size, vision.patch_size, vision.image_size, vision.num_attention_heads) == (768, 32, 224, 12)


def test_complex_is_the_mean_of_what_applies(blip, clip_b, monkeypatch):
    where = {"cat": Found((0, 0, 10, 10), 0.8), "bench": Found((60, 0, 70, 10), 0.4)}
    monkeypatch.setattr(scorers, "load_detector", lambda *given: lambda pixels, names: {n: where[n] for n in names})
    prompts = ["red cat on the left of a bench"] * 3
    monkeypatch.setitem(PHRASES, prompts[0], ["a red hat"])
    files, clip = clip_b
    scorer = Complex(**blip[1], clip=files["checkpoint"], clip_tokenizer=files["tokenizer"])
    images = [smooth_images(48, 48, 1)[0]] * 3
    scores = scorer.score(images, prompts, [{"kind": kind} for kind in ("spatial", "action", "both")])
    attribute = official_attribute(blip[0], images[0], ["a red hat?"])
    action = clip.cosine(images[:1], ["cat on the left of a bench"])[0]
    spatial = 0.25 * 1.2 + 0.5 * official_position("on the left of", where["cat"].box, where["bench"].box)
    wanted = [(attribute + spatial) / 2, (attribute + action) / 2, (attribute + spatial + action) / 3]
    np.testing.assert_allclose(scores["compbench_complex"], wanted, atol=1e-4)
    assert scores.keys() == {
        "compbench_complex",
        *(f"compbench_complex_{p}" for p in ("attribute", "spatial", "action")),
    }
    kinds = [{}, {"kind": "action"}, {"kind": "x"}, {"kind": "action"}]
    assert list(check_prompts(["compbench_complex"], [*prompts, "red"], kinds)) == [0, 2, 3]
