"""The registry, images in every form, composites, and the worker thread."""

import math
import re
import sys
import threading
import time
import warnings
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image

from diffusionopd import rewards
from diffusionopd.rewards import (
    NOT_APPLICABLE,
    REGISTRY,
    Composite,
    RewardError,
    RewardUnavailableError,
    RewardWorker,
    Scorer,
    build_composite,
    build_scorer,
    check_options,
    lacking,
    score_all,
    to_uint8,
)
from diffusionopd.rewards.compbench import phrases
from diffusionopd.rewards.images import each_uint8


class Fixed:
    """Gives the same scores to every batch of the right length."""

    def __init__(self, **scores: list[float]):
        self.scores = {name: np.array(values) for name, values in scores.items()}

    def score(self, images, prompts, metadata):
        return self.scores


def images(count: int = 2, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


# ---- images ----------------------------------------------------------------------------------------------------------


def test_every_form_of_an_image_becomes_the_same_uint8():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    wanted = levels.permute(0, 2, 3, 1).numpy()
    pil = [Image.fromarray(array) for array in wanted]
    for form in (levels, levels.float() / 255, levels.double() / 255, pil, wanted):
        np.testing.assert_array_equal(to_uint8(form), wanted)
        np.testing.assert_array_equal(np.stack(each_uint8(form)), wanted)
    assert to_uint8(wanted) is wanted
    assert to_uint8([Image.new("L", (4, 4), 7)]).tolist() == [[[[7] * 3] * 4] * 4]
    assert len(to_uint8([])) == len(to_uint8(torch.zeros(0, 3, 8, 8))) == 0
    image = torch.tensor([-0.1, 0.4999 / 255, 0.5001 / 255, 1.2]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert to_uint8(image)[0, :, :, 0].tolist() == [[0, 0], [1, 255]]


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        (torch.zeros(3, 8, 8), r"\[B, 3, H, W\]"),
        (torch.zeros(1, 8, 8, 3), r"\[B, 3, H, W\]"),
        (torch.full((1, 3, 8, 8), float("nan")), "not finite"),
        (torch.full((1, 3, 8, 8), 255.0).half(), r"255, not in \[0, 1\]"),
        (torch.linspace(-1, 1, 192).view(1, 3, 8, 8), "from -1 to 1"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "uint8 or float"),
        (np.zeros((1, 8, 8, 3)), "uint8"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))], "same shape"),
    ],
)
def test_images_of_another_form_are_refused(images, problem):
    with pytest.raises(ValueError, match=problem):
        to_uint8(images)


# ---- registry --------------------------------------------------------------------------------------------------------


def test_names_of_the_upstream_release_are_known():
    upstream = {"geneval", "ocr", "pickscore", "clipscore", "hpsv2", "aesthetic", "imagereward", "unifiedreward"}
    tiny = {"tiny_compose", "tiny_dull", "tiny_ocr", "tiny_scene"}
    assert upstream | tiny | {"jpeg_compressibility", "jpeg_incompressibility"} <= set(REGISTRY)


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setitem(REGISTRY, "needy", "diffusionopd_no_such_package:Scorer")
    monkeypatch.setitem(rewards.EXTRAS, "needy", "ocr")
    with pytest.raises(RewardError, match=r"diffusionopd_no_such_package.*pip install -e '\.\[ocr\]'"):
        build_scorer("needy")


class Placed(Fixed):
    def __init__(self, device="cpu", **scores):
        super().__init__(**scores)
        self.device = device


def test_a_registered_reward_is_built_with_its_options_and_may_have_a_device_of_its_own(monkeypatch):
    monkeypatch.setattr(rewards, "REGISTRY", dict(REGISTRY))
    rewards.register("placed", f"{__name__}:Placed")
    for own, expected in (({}, "cuda:1"), ({"device": "cuda:0"}, "cuda:0")):
        scorer = build_scorer("placed", "cuda:1", options={"fixed": [1.0, 2.0], **own})
        assert isinstance(scorer, Scorer) and scorer.device == expected
        assert scorer.score(None, ["", ""], [{}, {}])["fixed"].tolist() == [1.0, 2.0]


def test_names_and_options_are_checked_without_loading_anything():
    check_options({"pickscore": {"model": "no/such-model", "dtype": "bfloat16"}})
    for act, fact in (
        (lambda: check_options({"pickscor": {}}), "Did you mean pickscore"),
        (lambda: build_scorer("pikscore"), "Did you mean pickscore"),
        (lambda: build_scorer("jpeg_compressibility", options={"colour": True}), "colour"),
        (lambda: check_options({"pickscore": {"modle": "x"}}), "'modle'.*its options: device, dtype, model"),
        (lambda: check_options({"unifiedreward": {"question": 5}}), "question must be text, not question=5"),
        (lambda: check_options({"hpsv2": {"checkpoint": 3}}), "checkpoint must be text"),
        (lambda: check_options({"geneval": {"detector": "mmdet:a.py", "dtype": "float16"}}), "mmdetection computes"),
        (lambda: check_options({"pickscore": 3}), "must be {option: value}, not 3"),
    ):
        with pytest.raises(RewardError, match=fact):
            act()


WRONG = {
    "ocr": {"engine": "paddle"}, "geneval": {"detector": "foo", "dtype": "fp32", "batch_size": 0},
    "hpsv2": {"engine": "openclip"}, "hpsv3": {"batch_size": -1, "dtype": "int8"}, "pickscore": {"dtype": 16},
    "dpgbench": {"concurrency": 2.5, "attempts": True, "retries": -1, "backoff": -1, "timeout": 0},
    "unifiedreward": {"question": "question.txt", "retries": "3"},
}  # fmt: skip


def test_all_wrong_values_of_options_are_said_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "question.txt").write_text("How good is it?")
    with pytest.raises(RewardError) as caught:
        check_options(WRONG)
    lines = str(caught.value).splitlines()
    assert len(lines) == sum(map(len, WRONG.values()))
    for name, options in WRONG.items():
        for value in options.values():
            assert any(f"'{name}'" in line and str(value) in line for line in lines), (name, value)
        with pytest.raises(RewardError, match=str(next(iter(options.values())))):
            build_scorer(name, options=options)
    check_options({"geneval": {"detector": "mmdet:a.py", "batch_size": 1}, "unifiedreward": {"question": "none.txt"}})


# ---- JPEG ------------------------------------------------------------------------------------------------------------


def test_jpeg_size_in_kilobytes_and_its_negative(monkeypatch):
    batch = torch.cat([images(1, 64), torch.full((1, 3, 64, 64), 0.5)])
    scorers = {name: build_scorer(name) for name in ("jpeg_compressibility", "jpeg_incompressibility")}
    scores = score_all(scorers, batch, ["a", "b"], [{}, {}])
    sizes = scores["jpeg_incompressibility"]
    assert sizes[0] > 3 * sizes[1] > 0
    assert 0.3 < sizes[1] < 2  # kB: a flat image is little more than the file's header
    np.testing.assert_array_equal(scores["jpeg_compressibility"], -sizes)
    monkeypatch.setattr(Image.Image, "save", lambda image, file, **_: file.write(bytes(10_000)))
    (score,) = scorers["jpeg_compressibility"].score(batch[:1], ["a"], [{}])["jpeg_compressibility"]
    assert score != NOT_APPLICABLE and math.isclose(score, -10, abs_tol=1e-5), "that size applies as any other"


# ---- composite -------------------------------------------------------------------------------------------------------


def test_composite_gives_parts_and_the_weighted_mean_of_those_that_apply():
    none = NOT_APPLICABLE
    for weights, a, b, average in (
        ((3.0, 1.0), [1.0, 0.0], [5.0, 4.0], [(3 * 1 + 5) / 4, (0 + 4) / 4]),
        ((1.0, 1.0), [none, 2.0, none], [3.0, 4.0, none], [3.0, 3.0, none]),
        ((1.0, 0.0), [1.0, 2.0], [9.0, 9.0], [1.0, 2.0]),  # weight 0: reported only
    ):
        parts = {"a": Fixed(a=a), "b": Fixed(b=b, extra=b)}
        composite, n = Composite(dict(zip("ab", weights, strict=True)), parts), len(a)
        scores = composite.score(images(n), [""] * n, [{}] * n)
        assert list(scores) == ["a", "b", "extra", "avg"]
        assert [values.tolist() for values in scores.values()] == [a, b, b, average]
        assert all(values.dtype == np.float64 for values in scores.values())


@pytest.mark.parametrize("weights", [{}, {"a": -1.0}, {"a": float("nan")}, {"a": "1"}, {"a": True}, {"a": 0.0}])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(RewardError):
        build_composite(weights)


@pytest.mark.parametrize(
    ("scorer", "problem"),
    [
        (Fixed(a=[1.0]), "shape"),
        (Fixed(a=[1.0, float("nan")]), "image 1 of the batch is nan"),
        (Fixed(other=[1.0, 1.0]), "no score under its own name"),
        (Fixed(a=[1.0, 1.0], avg=[1.0, 1.0]), "another reward gives too: avg"),
        (object(), "reward 'a' failed: AttributeError.*score"),
    ],
)
def test_malformed_scores_and_failures_are_refused_by_name(scorer, problem):
    with pytest.raises(RewardError, match=problem):
        score_all({"a": scorer}, images(), ["", ""], [{}, {}])


# ---- worker ----------------------------------------------------------------------------------------------------------


class Gated:
    """Waits for a gate, then gives the mean level of each image; fails for the prompt "bad"."""

    def __init__(self) -> None:
        self.gate, self.begun, self.threads = threading.Event(), threading.Event(), set()

    def score(self, images, prompts, metadata):
        self.begun.set()
        assert self.gate.wait(10)
        self.threads.add(threading.get_ident())
        if "bad" in prompts:
            raise RuntimeError("cannot score this")
        return {"mean": to_uint8(images).mean(axis=(1, 2, 3))}


def test_worker_scores_copies_in_one_other_thread_in_order_and_returns_exceptions():
    scorer = Gated()
    with closing(RewardWorker(scorer)) as worker:
        batch, futures = torch.zeros(1, 3, 4, 4, dtype=torch.uint8), []
        for i in range(4):
            futures.append(worker.submit(batch.fill_(i), ["bad" if i == 2 else "p"], [{}]))
        scorer.gate.set()
        assert isinstance(futures.pop(2).exception(10), RuntimeError)
        assert [future.result(10)["mean"][0] for future in futures] == [0, 1, 3]
    assert len(scorer.threads) == 1 and threading.get_ident() not in scorer.threads


def test_worker_bounds_what_waits():
    scorer = Gated()
    worker = RewardWorker(scorer, max_pending=1)
    worker.submit(images(1), ["p"], [{}])
    assert scorer.begun.wait(10)  # one is being scored, so the next fills the queue and the third must wait
    worker.submit(images(1), ["p"], [{}])
    third = threading.Thread(target=worker.submit, args=(images(1), ["p"], [{}]))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    scorer.gate.set()
    third.join(10)
    assert not third.is_alive()
    worker.close()


def test_closing_finishes_or_drops_what_waits():
    for cancel in (False, True):
        scorer = Gated()
        worker = RewardWorker(scorer)
        first = worker.submit(images(1), ["p"], [{}])
        assert scorer.begun.wait(10)
        second = worker.submit(images(1), ["p"], [{}])
        threading.Timer(0.1, scorer.gate.set).start()
        worker.close(cancel=cancel)
        assert first.done() and second.cancelled() is cancel
        worker.close()  # again: no effect
        with pytest.raises(RewardError, match="closed"):
            worker.score(images(1), ["p"], [{}])


def test_closing_does_not_wait_for_a_scorer_that_hangs(monkeypatch):
    monkeypatch.setattr(rewards.worker, "SHUTDOWN_GRACE", 0.05)
    scorer = Gated()
    worker = RewardWorker(scorer, max_pending=1)
    futures = [worker.submit(images(1), ["a"], [{}])]

    def fill() -> None:
        while not (future := worker.submit(images(1), ["a"], [{}])).done():
            futures.append(future)
        refused.append(future.exception())

    refused: list = []
    blocked = threading.Thread(target=fill)
    blocked.start()
    assert scorer.begun.wait(10)
    worker.close(cancel=True)
    blocked.join(5)
    assert not blocked.is_alive()  # a full queue is given up, too
    assert isinstance(refused[0], RewardError)
    assert not futures[0].done() and all(future.cancelled() for future in futures[1:])
    scorer.gate.set()


class Sometimes:
    """Unavailable as often as `failures` says."""

    def __init__(self, failures):
        self.failures, self.asked = failures, 0

    def score(self, images, prompts, metadata):
        self.asked += 1
        if self.asked <= self.failures:
            raise RewardUnavailableError("the server does not answer")
        return {"mean": to_uint8(images).mean(axis=(1, 2, 3))}


@pytest.mark.parametrize(
    ("failures", "timeout", "retry", "asked"), [(3, 10, True, 4), (10**6, 0.3, True, None), (10**6, 0.3, False, 1)]
)
def test_a_worker_asks_again_says_so_and_gives_up_with_the_scorers_own_error(
    monkeypatch, failures, timeout, retry, asked
):
    monkeypatch.setattr(rewards.worker, "FIRST_PAUSE", 0.01)
    scorer = Sometimes(failures)
    with (
        closing(RewardWorker(scorer, name="r", timeout=timeout, retry_unavailable=retry)) as worker,
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        future = worker.submit(images(1), ["p"], [{}])
        if failures == 3:
            assert "mean" in future.result()
        else:
            with pytest.raises(RewardUnavailableError, match="the server does not answer"):
                future.result()
    assert scorer.asked == asked or (asked is None and scorer.asked >= 3)
    texts = [f"the server does not answer; asked again for up to {timeout} seconds"] if retry else []
    assert [str(record.message) for record in said] == texts


def test_a_batch_over_its_time_is_given_up_until_it_ends():
    scorer = Gated()
    limited = RewardWorker(scorer, 1, name="slow", timeout=0.1)
    late = "reward 'slow' has been scoring one batch for more than 0.1 seconds.*reward_timeout"
    with pytest.raises(RewardError, match=late):
        limited.score(images(1), ["p"], [{}])
    with pytest.raises(RewardError, match=late):  # at once: nothing is queued behind it
        limited.score(images(1), ["p"], [{}])
    scorer.gate.set()
    for _ in range(1000):
        if not limited.overdue:
            break
        time.sleep(0.01)
    assert "mean" in limited.score(images(1), ["p"], [{}])
    limited.close(cancel=True)


@pytest.mark.parametrize(
    ("name", "options", "missing"),
    [
        ("geneval", {"checkpoint": "reward_ckpts/none.pth"}, True),
        ("geneval", {"checkpoint": "reward_ckpts/none.pth", "detector": "transformers:owner/name"}, False),
        ("unifiedreward", {"question": "reward_ckpts/none.txt"}, False),
        ("imagereward", {"checkpoint": "reward_ckpts/none.pt"}, True),
        ("jpeg_compressibility", {}, False),
    ],
)
def test_files_that_a_reward_lacks_are_named_without_loading(name, options, missing):
    assert (options.get("checkpoint", " ") in lacking(name, options)) == missing == bool(lacking(name, options))


@pytest.mark.parametrize(
    ("name", "options", "package", "said_alike"),
    [
        ("ocr", {}, "rapidfuzz", True),
        ("ocr", {}, "rapidocr", True),
        ("ocr", {"engine": "paddleocr"}, "paddle", True),
        ("hpsv2", {}, "ftfy", True),
        ("hpsv2", {"engine": "open_clip"}, "open_clip", True),
        ("geneval", {}, "scipy", False),  # whose file is looked for first
        ("geneval", {"detector": "mmdet:a.py"}, "mmdet", True),
        ("compbench_attribute", {}, "spacy", True),
        ("compbench_complex", {}, "spacy", True),
        ("compbench_spatial", {}, "spacy", True),
        ("tiny_ocr", {}, "rapidocr", True),
        ("tiny_compose", {}, "scipy", False),  # which imports it when it scores
    ],
)
def test_packages_that_a_reward_lacks_are_named_without_loading(name, options, package, said_alike, monkeypatch):
    phrases.load_parser.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    found = lacking(name, options)
    assert package in found and re.search("install|environment.sh make", found)
    if said_alike:
        with pytest.raises(RewardError) as caught:
            build_scorer(name, options=options)
        halted = f"import of {package} halted; None in sys.modules", f"No module named {package!r}"
        assert str(caught.value).replace(*halted) == found.replace(*halted)
