"""The registry, images in every form, composites, and the worker thread."""

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
    score_all,
    to_uint8,
)
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


def test_floats_are_rounded_and_clamped():
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


def test_no_images_at_all():
    assert len(to_uint8([])) == 0
    assert len(to_uint8(torch.zeros(0, 3, 8, 8))) == 0


# ---- registry --------------------------------------------------------------------------------------------------------


def test_names_of_the_upstream_release_are_known():
    upstream = {"geneval", "ocr", "pickscore", "clipscore", "hpsv2", "aesthetic", "imagereward", "unifiedreward"}
    tiny = {"tiny_compose", "tiny_ocr", "tiny_scene"}
    assert upstream | tiny | {"jpeg_compressibility", "jpeg_incompressibility"} == set(REGISTRY)


def test_a_misspelled_reward_names_the_nearest():
    with pytest.raises(RewardError, match="Did you mean pickscore"):
        build_scorer("pikscore")


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setitem(REGISTRY, "needy", "diffusionopd_no_such_package:Scorer")
    monkeypatch.setitem(rewards.EXTRAS, "needy", "ocr")
    with pytest.raises(RewardError, match=r"diffusionopd_no_such_package.*pip install -e '\.\[ocr\]'"):
        build_scorer("needy")


def test_a_registered_reward_is_built_with_its_options(monkeypatch):
    monkeypatch.setattr(rewards, "REGISTRY", dict(REGISTRY))
    rewards.register("fixed", f"{__name__}:Fixed")
    scorer = build_scorer("fixed", options={"fixed": [1.0, 2.0]})
    assert isinstance(scorer, Scorer)
    assert scorer.score(None, ["", ""], [{}, {}])["fixed"].tolist() == [1.0, 2.0]


def test_an_option_that_a_scorer_does_not_have_is_refused():
    with pytest.raises(RewardError, match="colour"):
        build_scorer("jpeg_compressibility", options={"colour": True})
    with pytest.raises(RewardError, match="unexpected keyword argument 'modle'.*its options: device, dtype, model"):
        check_options({"pickscore": {"modle": "x"}})


def test_options_are_checked_without_loading_anything():
    check_options({"pickscore": {"model": "no/such-model", "dtype": "bfloat16"}})
    with pytest.raises(RewardError, match="Did you mean pickscore"):
        check_options({"pickscor": {}})
    with pytest.raises(RewardError, match="must be {option: value}, not 3"):
        check_options({"pickscore": 3})


class Placed:
    def __init__(self, device="cpu"):
        self.device = device


def test_a_reward_may_have_a_device_of_its_own(monkeypatch):
    monkeypatch.setattr(rewards, "REGISTRY", {"placed": f"{__name__}:Placed"})
    assert build_scorer("placed", "cuda:1").device == "cuda:1"
    assert build_scorer("placed", "cuda:1", options={"device": "cuda:0"}).device == "cuda:0"


# ---- JPEG ------------------------------------------------------------------------------------------------------------


def test_jpeg_size_in_kilobytes_and_its_negative():
    batch = torch.cat([images(1, 64), torch.full((1, 3, 64, 64), 0.5)])
    scores = score_all(
        {name: build_scorer(name) for name in ("jpeg_compressibility", "jpeg_incompressibility")},
        batch,
        ["a", "b"],
        [{}, {}],
    )
    sizes = scores["jpeg_incompressibility"]
    assert sizes[0] > 3 * sizes[1] > 0
    assert 0.3 < sizes[1] < 2  # kB: a flat image is little more than the file's header
    np.testing.assert_array_equal(scores["jpeg_compressibility"], -sizes)


# ---- composite -------------------------------------------------------------------------------------------------------


def test_composite_gives_parts_and_weighted_mean():
    composite = Composite({"a": 3.0, "b": 1.0}, {"a": Fixed(a=[1.0, 0.0]), "b": Fixed(b=[5.0, 4.0], extra=[7.0, 8.0])})
    scores = composite.score(images(), ["x", "y"], [{}, {}])
    assert list(scores) == ["a", "b", "extra", "avg"]
    np.testing.assert_allclose(scores["avg"], [(3 * 1 + 5) / 4, (0 + 4) / 4])
    assert all(values.dtype == np.float64 for values in scores.values())


def test_a_part_that_does_not_apply_is_kept_and_left_out_of_the_mean():
    composite = Composite(
        {"a": 1.0, "b": 1.0},
        {"a": Fixed(a=[NOT_APPLICABLE, 2.0, NOT_APPLICABLE]), "b": Fixed(b=[3.0, 4.0, NOT_APPLICABLE])},
    )
    scores = composite.score(images(3), [""] * 3, [{}] * 3)
    assert scores["a"].tolist() == [-10.0, 2.0, -10.0]
    assert scores["avg"].tolist() == [3.0, 3.0, -10.0]


def test_a_part_of_weight_zero_is_reported_only():
    composite = Composite({"a": 1.0, "b": 0.0}, {"a": Fixed(a=[1.0, 2.0]), "b": Fixed(b=[9.0, 9.0])})
    scores = composite.score(images(), ["", ""], [{}, {}])
    assert scores["avg"].tolist() == [1.0, 2.0]
    assert scores["b"].tolist() == [9.0, 9.0]


@pytest.mark.parametrize("weights", [{}, {"a": -1.0}, {"a": float("nan")}, {"a": "1"}, {"a": True}, {"a": 0.0}])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(RewardError):
        build_composite(weights)


@pytest.mark.parametrize(
    ("scores", "problem"),
    [
        ({"a": [1.0]}, "shape"),
        ({"a": [1.0, float("nan")]}, "image 1 of the batch is nan"),
        ({"other": [1.0, 1.0]}, "no score under its own name"),
        ({"a": [1.0, 1.0], "avg": [1.0, 1.0]}, "another reward gives too: avg"),
    ],
)
def test_malformed_scores_are_refused(scores, problem):
    with pytest.raises(RewardError, match=problem):
        score_all({"a": Fixed(**scores)}, images(), ["", ""], [{}, {}])


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


def test_worker_scores_in_one_other_thread_and_in_order():
    scorer = Gated()
    scorer.gate.set()
    with closing(RewardWorker(scorer)) as worker:
        futures = [worker.submit(torch.full((1, 3, 4, 4), i, dtype=torch.uint8), ["p"], [{}]) for i in range(6)]
        means = [future.result(10)["mean"][0] for future in futures]
    assert means == [0, 1, 2, 3, 4, 5]
    assert len(scorer.threads) == 1 and threading.get_ident() not in scorer.threads


def test_worker_takes_a_copy_of_the_images():
    scorer = Gated()
    with closing(RewardWorker(scorer)) as worker:
        images = torch.full((1, 3, 4, 4), 9, dtype=torch.uint8)
        future = worker.submit(images, ["p"], [{}])
        images.zero_()
        scorer.gate.set()
        assert future.result(10)["mean"][0] == 9


def test_worker_returns_exceptions_and_goes_on():
    scorer = Gated()
    scorer.gate.set()
    with closing(RewardWorker(scorer)) as worker:
        bad = worker.submit(images(1), ["bad"], [{}])
        good = worker.submit(images(1), ["good"], [{}])
        assert isinstance(bad.exception(10), RuntimeError)
        assert "mean" in good.result(10)


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
    hanging, let_go = threading.Event(), threading.Event()

    class Hanging:
        def score(self, images, prompts, metadata):
            hanging.set()
            let_go.wait(60)
            return {}

    worker = RewardWorker(Hanging(), max_pending=1)
    futures = [worker.submit(images(1), ["a"], [{}])]

    def fill() -> None:
        while not (future := worker.submit(images(1), ["a"], [{}])).done():
            futures.append(future)
        refused.append(future.exception())

    refused: list = []
    blocked = threading.Thread(target=fill)
    blocked.start()
    assert hanging.wait(10)
    worker.close(cancel=True)
    blocked.join(5)
    assert not blocked.is_alive()  # a full queue is given up, too
    assert isinstance(refused[0], RewardError)
    assert not futures[0].done() and all(future.cancelled() for future in futures[1:])
    let_go.set()


class Sometimes:
    """Unavailable as often as `failures` says."""

    def __init__(self, failures):
        self.failures, self.asked = failures, 0

    def score(self, images, prompts, metadata):
        self.asked += 1
        if self.asked <= self.failures:
            raise RewardUnavailableError("the server does not answer")
        return {"mean": to_uint8(images).mean(axis=(1, 2, 3))}


@pytest.fixture
def short_pauses(monkeypatch):
    monkeypatch.setattr(rewards.worker, "FIRST_PAUSE", 0.01)


def test_a_worker_that_retries_asks_again_and_says_so(short_pauses):
    scorer = Sometimes(3)
    with (
        closing(RewardWorker(scorer, name="r", timeout=10, retry_unavailable=True)) as worker,
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        assert "mean" in worker.submit(images(1), ["p"], [{}]).result()
    assert scorer.asked == 4
    assert [str(record.message) for record in said] == ["the server does not answer; asked again for up to 10 seconds"]


@pytest.mark.parametrize(("retry", "least"), [(True, 3), (False, 1)])
def test_a_worker_gives_up_with_the_scorers_own_error(short_pauses, retry, least):
    scorer = Sometimes(10**6)
    worker = RewardWorker(scorer, name="r", timeout=0.3, retry_unavailable=retry)
    with warnings.catch_warnings(), closing(worker):
        warnings.simplefilter("ignore")
        with pytest.raises(RewardUnavailableError, match="the server does not answer"):
            worker.submit(images(1), ["p"], [{}]).result()
    assert scorer.asked >= least and (retry or scorer.asked == 1)


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


def test_a_scorer_that_fails_is_named():
    scorer = Gated()
    scorer.gate.set()
    with pytest.raises(RewardError, match=r"reward 'mean' failed: RuntimeError\('cannot score this'\)"):
        score_all({"mean": scorer}, images(1), ["bad"], [{}])
