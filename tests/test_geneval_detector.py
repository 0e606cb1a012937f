"""The detector on a tiny Mask2Former of random weights: what comes before and after it, and the choice of one."""

import json
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffusionopd.rewards import RewardError
from diffusionopd.rewards.geneval import mask2former
from diffusionopd.rewards.geneval.classes import CLASSES, COCO
from diffusionopd.rewards.geneval.detector import build_detector, load_model
from diffusionopd.rewards.geneval.mask2former import resize_bilinear
from tests.geneval_tiny import save_checkpoint, see_small, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Smooth random images, uint8 [2, 40, 56, 3]."""
    noise = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(3))
    smooth = F.interpolate(noise, (40, 56), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


@pytest.fixture
def small_input(monkeypatch):
    see_small(monkeypatch)


def test_the_size_is_that_of_mmcv():
    sizes = {
        (512, 512): (800, 800), (1024, 1024): (800, 800), (512, 768): (800, 1200), (480, 640): (800, 1067),  # 1066.67
        (300, 900): (444, 1333), (900, 300): (1333, 444),  # the long side decides
    }  # fmt: skip
    assert {size: mask2former.resized_size(*size) for size in sizes} == sizes


def random_picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_resizing_is_that_of_cv2_to_the_last_bit():
    cv2 = pytest.importorskip("cv2")
    sizes = {(64, 64): (100, 100), (30, 50): (80, 133), (99, 101): (80, 82), (160, 90): (80, 45), (7, 1): (9, 3)}
    for size, wanted in sizes.items():
        picture = random_picture(*size)
        ours = resize_bilinear(torch.from_numpy(picture)[None], *wanted)[0].numpy()
        np.testing.assert_array_equal(ours, cv2.resize(picture, wanted[::-1], interpolation=cv2.INTER_LINEAR))


def test_preprocessing_resizes_normalises_and_pads(small_input):
    picture = torch.from_numpy(random_picture(30, 50))[None]
    images, size = mask2former.preprocess(picture)
    assert size == (96, 160) and images.shape == (1, 3, 96, 160) and images.dtype == torch.float32
    resized = resize_bilinear(picture, *size)[0].numpy()
    wanted = (resized - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    np.testing.assert_allclose(images[0].permute(1, 2, 0).numpy(), wanted, atol=1e-5)
    images, size = mask2former.preprocess(picture[:, :, :41])
    assert size == (96, 131) and images.shape == (1, 3, 96, 160)
    assert images[..., 131:].abs().max() == 0 and images[..., 130].abs().min() > 0


def slow_instances(class_logits, mask_logits, padded, resized, original):
    """mmdetection's rule, one pair of query and class after the other, all masks at full size."""
    queries, classes = class_logits.shape[0], class_logits.shape[1] - 1
    pairs = []
    for query in range(queries):
        probabilities = class_logits[query].softmax(0)
        pairs += [(probabilities[label].item(), query, label) for label in range(classes)]
    found = []
    for probability, query, label in sorted(pairs, reverse=True)[:100]:
        logits = F.interpolate(mask_logits[query][None, None], padded, mode="bilinear", align_corners=False)
        logits = logits[:, :, : resized[0], : resized[1]]
        logits = F.interpolate(logits, original, mode="bilinear", align_corners=False)[0, 0]
        inside = logits[logits > 0].sigmoid()
        if len(inside):
            ys, xs = torch.nonzero(logits > 0, as_tuple=True)
            box = tuple(float(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
            found.append((label, box, probability * inside.mean().item(), (logits > 0).numpy()))
    return found


def test_instances_are_those_of_the_slow_loop():
    generator = torch.Generator().manual_seed(1)
    class_logits = 3 * torch.randn(20, 9, generator=generator)
    mask_logits = F.interpolate(torch.randn(1, 20, 4, 5, generator=generator), (16, 24))[0]
    sizes = ((64, 96), (50, 90), (35, 63))
    wanted = [found for found in slow_instances(class_logits, mask_logits, *sizes) if found[2] > 0.1]
    got = mask2former.instances(class_logits, mask_logits, *sizes, floor=0.1)
    assert len(got) == len(wanted) > 10
    by_score = sorted(got, key=lambda pair: pair[1].score, reverse=True)
    for (label, detection), other in zip(by_score, sorted(wanted, key=lambda found: -found[2]), strict=True):
        assert label == other[0] and detection.box == other[1]
        assert detection.score == pytest.approx(other[2], abs=1e-6)
        np.testing.assert_array_equal(detection.mask, other[3])


def test_an_empty_mask_is_no_instance():
    class_logits = torch.tensor([[9.0, 0.0, 0.0]])
    assert mask2former.instances(class_logits, -torch.ones(1, 4, 4), (16, 16), (16, 16), (16, 16), floor=0.0) == []


def assert_same_detections(mine, others, score: float, box: float):
    for first, second in zip(mine, others, strict=True):
        assert first.keys() == second.keys() <= set(CLASSES)
        for name, found in first.items():
            for a, b in zip(found, second[name], strict=True):
                assert a.score == pytest.approx(b.score, abs=score)
                np.testing.assert_allclose(a.box, b.box, atol=box)
    assert sum(len(found) for picture in mine for found in picture.values()) >= 4


def test_detections_are_in_range_and_do_not_depend_on_the_batch(model, pixels, small_input):
    together = mask2former.detect(model, pixels)
    assert_same_detections(together, [mask2former.detect(model, pixels[i : i + 1])[0] for i in range(2)], 1e-4, 0)
    for found in (item for picture in together for items in picture.values() for item in items):
        left, top, right, bottom = found.box
        assert 0 <= left < right <= 56 and 0 <= top < bottom <= 40 and 0.3 < found.score <= 1
        assert found.mask.shape == (40, 56) and found.mask[int(top) : int(bottom), int(left) : int(right)].any()


@pytest.mark.gpu
def test_detections_on_a_gpu_are_those_on_a_cpu(pixels, small_input):
    assert_same_detections(*(mask2former.detect(tiny_model().to(d), pixels) for d in ("cpu", "cuda")), 1e-3, 1)


# --------------------------------------------------------------------------------------------------------- choices


def test_a_transformers_detector_is_taken_with_a_warning(model, pixels, tmp_path, small_input):
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="not comparable"):
        detector = build_detector(f"transformers:{tmp_path}", "unused.pth", "cpu", torch.float32)
    wanted = mask2former.detect(model, pixels)
    assert [picture.keys() for picture in detector(pixels)] == [picture.keys() for picture in wanted]


def test_choices_that_are_none_are_refused():
    for choice in ("mmdetection", "transformers:", "mmdet", "yolo:x"):
        with pytest.raises(RewardError, match="is none of converted, transformers"):
            build_detector(choice, "x.pth", "cpu", torch.float32)
    with pytest.raises(RewardError, match="hf download nobody/no-such-detector"):
        load_model("nobody/no-such-detector")


def test_labels_must_be_cocos_in_order(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for labels in ([*COCO, *["wall"] * 53], sorted(COCO)):
        (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": dict(enumerate(labels))}))
        with pytest.raises(RewardError, match="detector"):
            load_model(str(tmp_path))


class FakeMmdet:
    """Stands in for `mmdet.apis`: what mmdetection 2 or 3 gives for one dog and one doubtful cat."""

    def __init__(self, version: int, weights: dict[str, torch.Tensor]):
        self.version, self.weights, self.seen = version, weights, []

    def init_detector(self, config, checkpoint, device):
        self.given = config, checkpoint
        return types.SimpleNamespace(state_dict=lambda: self.weights)

    def inference_detector(self, model, picture):
        self.seen.append(picture)
        boxes, masks = [np.zeros((0, 5), np.float32) for _ in COCO], [[] for _ in COCO]
        mask = np.zeros(picture.shape[:2], dtype=bool)
        mask[2:6, 1:4] = True
        for name, score in (("dog", 0.8), ("cat", 0.1)):
            boxes[COCO.index(name)] = np.array([[1, 2, 4, 6, score]], np.float32)
            masks[COCO.index(name)] = [mask]
        if self.version == 2:
            return boxes, masks
        labels = [COCO.index("dog"), COCO.index("cat")]
        rows = np.concatenate([boxes[label] for label in labels])
        found = types.SimpleNamespace(
            labels=np.array(labels), bboxes=rows[:, :4], scores=rows[:, 4], masks=np.stack([mask, mask])
        )
        found.cpu = found.numpy = lambda: found
        return types.SimpleNamespace(pred_instances=found)


@pytest.fixture
def files(tmp_path) -> tuple[str, str]:
    (tmp_path / "config.py").touch()
    return str(tmp_path / "config.py"), str(save_checkpoint(tmp_path / "w.pth", {"a": torch.zeros(1)}))


@pytest.mark.parametrize("version", [2, 3])
def test_mmdetection_is_given_bgr_and_read_in_both_versions(version, files, pixels, tmp_path, monkeypatch):
    fake = FakeMmdet(version, {"a": torch.zeros(1)})
    monkeypatch.setitem(sys.modules, "mmdet", types.SimpleNamespace(apis=fake))
    monkeypatch.setenv("HOME", str(tmp_path))
    detector = build_detector("mmdet:~/config.py", "~/w.pth", "cpu", torch.float32)
    assert fake.given == files
    objects = detector(pixels)
    np.testing.assert_array_equal(fake.seen[1], pixels[1][:, :, ::-1])
    assert [list(picture) for picture in objects] == [["dog"], ["dog"]]
    (dog,) = objects[0]["dog"]
    assert dog.box == (1, 2, 4, 6) and dog.score == pytest.approx(0.8) and dog.mask.sum() == 12


def test_mmdetection_with_other_weights_or_without_itself_is_an_error(files, monkeypatch):
    other = types.SimpleNamespace(apis=FakeMmdet(2, {"b": torch.zeros(1)}))
    for module, config, fact in (
        (other, files[0], "does not fit the installed mmdetection: 2 entries differ, such as a"),
        (other, "none.py", "there is no file none.py"),
        (None, files[0], "needs mmdetection, which cannot be imported"),
    ):
        monkeypatch.setitem(sys.modules, "mmdet", module)
        with pytest.raises(RewardError, match=fact):
            build_detector(f"mmdet:{config}", files[1], "cpu", torch.float32)
