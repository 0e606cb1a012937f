"""UnifiedReward against a chat server on the loopback: what it asks, what it reads, what it does in trouble."""

import json
import threading
import time
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import urllib3.util.retry
from PIL import Image

from diffusionopd.rewards import NOT_APPLICABLE, RewardError, RewardWorker, Scorer
from diffusionopd.rewards.judges.server import LONGEST_PAUSE, api_root
from diffusionopd.rewards.unifiedreward import OWN_QUESTION, UnifiedReward, final_score

from .chat import ChatServer, chat, grey, sent_image, sent_text, serving

KEY = "sk-very-secret"


@pytest.fixture
def server():
    with serving(ChatServer()) as server:
        yield server


@pytest.fixture
def question(tmp_path):
    path = tmp_path / "question.txt"
    path.write_text("<image>\nHow good? {1-5}\nCaption: [{prompt}]\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def build(server, question, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    options = {"api_key_variable": "TEST_KEY", "backoff": 0.001, "timeout": 10.0, "question": question}
    return lambda **given: UnifiedReward(**{"base_url": server.address, **options, **given})


# ---- reading an answer -----------------------------------------------------------------------------------------------


SCORES = {
    "Final Score: 4.5": 4.5, "dog (object): 1\nFinal Score: 3": 3.0, "**Final Score:** 4": 4.0,
    "**Final Score: 2.75**": 2.75, "Final Score: **4/5**": 4.0, "Final Score: **4**/5.0": 4.0, "final score = 1": 1.0,
    "FINAL  SCORE: 5.": 5.0, "'Final Score:' 3 out of 5": 3.0, "Final Score: 4, since 3 dogs are there": 4.0,
    "Final Score: 4\n- 3 dogs": 4.0, "Final Score: 4 - good": 4.0,
    "I give a final score after this. Final Score: 2": 2.0, "Final Score: 1-5\nFinal Score: 2": 2.0,
}  # fmt: skip
NO_SCORES = [
    "", "4", "Final Score:", "Final Score: four", "Final Score: 45", "Final Score: 4,5", "Final Score: 0",
    "Final Score: 5.5", "Final Score: -3", "Final Score: 4/10", "Final Score: 4/50", "Final Score: **4**/10",
    "Final Score: 4 out of 10", "Final Score: 3%", "Final Score (1-5)", "Score: 3", "Final Score: 2.3.4",
]  # fmt: skip


def test_the_score_of_an_answer_is_found_or_none():
    assert {answer: final_score(answer) for answer in SCORES} == SCORES
    assert [answer for answer in NO_SCORES if final_score(answer) is not None] == []


def test_answers_without_a_score_do_not_apply_and_are_counted(build, server):
    answers = ["Final Score: 5", "I cannot say. " * 100, None, "Final Score: 45"]
    server.answer = lambda number, body: chat(answers[int(sent_text(body)[-2])])
    scorer = build()
    with pytest.warns(UserWarning, match=r"without a score: 'I cannot say\. .* \.\.\.'") as caught:
        scores = scorer.score(grey(0, 1, 2, 3), ["0", "1", "2", "3"], [{}] * 4)
    assert scores["unifiedreward"].tolist() == [1.0, NOT_APPLICABLE, NOT_APPLICABLE, NOT_APPLICABLE]
    assert scores["unifiedreward_unparsable"].tolist() == [0.0, 1.0, 1.0, 1.0]
    scorer.score(grey(0, 1), ["1", "1"], [{}] * 2)
    assert len(caught) == 1 and len(str(caught[0].message)) < 400


# ---- what is asked ---------------------------------------------------------------------------------------------------


def test_a_request_is_that_of_the_official_client(build, server):
    """Images of another size become 512."""
    pixels = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    small = Image.fromarray(pixels[:32, :48])
    for images, wanted in ((pixels[None], pixels), ([small], small.resize((512, 512), Image.Resampling.BICUBIC))):
        build().score(images, ["a {red} dog"], [{}])
        request = server.requests[-1]
        assert request.path == "/v1/chat/completions"
        assert request.body["model"] == "UnifiedReward-7b-v1.5" and request.body["temperature"] == 0
        assert [part["type"] for part in request.body["messages"][0]["content"]] == ["image_url", "text"]
        assert sent_text(request.body) == "<image>\nHow good? {1-5}\nCaption: [a {red} dog]"
        np.testing.assert_array_equal(np.asarray(sent_image(request.body)), np.asarray(wanted))


def test_scores_are_in_the_order_of_the_images(build, server):
    def answer(number, body):
        level = sent_image(body).getpixel((0, 0))[0]
        assert sent_text(body).endswith(f"[prompt {level}]")
        time.sleep(0.02 * (5 - level))  # the last image is answered first
        return chat(f"Final Score: {level}")

    server.answer = answer
    scorer = build(concurrency=5)
    assert isinstance(scorer, Scorer)
    for _ in range(2):  # a second batch is as good as the first
        scores = scorer.score(grey(1, 2, 3, 4, 5), [f"prompt {i}" for i in range(1, 6)], [{}] * 5)
        np.testing.assert_allclose(scores["unifiedreward"], [0.2, 0.4, 0.6, 0.8, 1.0])
        assert scores["unifiedreward"].dtype == np.float64
    assert scorer.score([], [], [])["unifiedreward"].shape == (0,)


def test_no_more_requests_than_the_bound_are_under_way(build, server):
    together = threading.Barrier(3)

    def answer(number, body):
        together.wait(timeout=10)  # three must come before one is answered
        time.sleep(0.05)  # a fourth would come now
        return chat("Final Score: 3")

    server.answer = answer
    build(concurrency=3).score(grey(*range(9)), ["p"] * 9, [{}] * 9)
    assert server.most_under_way == 3


def test_without_the_official_question_it_asks_its_own_and_says_so(build, server, tmp_path):
    with pytest.warns(UserWarning, match="cannot be compared.*tools.download rewards unifiedreward"):
        scorer = build(question=str(tmp_path / "none.txt"))
    scorer.score(grey(0), ["a dog"], [{}])
    assert sent_text(server.requests[0].body) == OWN_QUESTION.replace("{prompt}", "a dog")
    assert "Final Score:" in OWN_QUESTION and OWN_QUESTION.count("{prompt}") == 1
    for content, fact in ((b"404: Not Found", r"has no \{prompt\}"), (b"caf\xe9 {prompt}", "cannot be read.*utf-8")):
        (tmp_path / "other.txt").write_bytes(content)
        with pytest.raises(RewardError, match=rf"other\.txt {fact}.*tools.download"):
            build(question=str(tmp_path / "other.txt"))


def test_another_judge_is_a_subclass_with_a_name_and_a_parser(server, question):
    class Yes(UnifiedReward):
        name = "yes"

        def parse(self, answer):
            return {"Yes": 1.0, "No": 0.0}.get(answer)

    server.answer = lambda number, body: chat({"a": "Yes", "b": "No"}.get(sent_text(body)[-2]))
    with pytest.warns(UserWarning, match="'yes'"):
        scores = Yes(base_url=server.address, question=question).score(grey(0, 1, 2), ["a", "b", "c"], [{}] * 3)
    assert scores["yes"].tolist() == [1.0, 0.0, NOT_APPLICABLE] and scores["yes_unparsable"].tolist() == [0, 0, 1]
    assert len(scores) == 2


# ---- address, key, options -------------------------------------------------------------------------------------------


def test_the_address_may_be_given_with_and_without_v1():
    for given in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert api_root(given) == "http://h:1/v1"
    assert api_root("https://h/models/reward/") == "https://h/models/reward"
    for given in ("", "h:1", "ftp://h/v1", "http://", f"http://user:{KEY}@h:1/v1"):
        with pytest.raises(RewardError, match="base_url") as error:
            api_root(given)
        assert KEY not in str(error.value)


def test_the_key_is_in_the_header_and_nowhere_else(build, server, monkeypatch):
    server.answer = lambda number, body: (400, {}, f"bad request with key {KEY}")
    scorer = build()
    with pytest.raises(RewardError, match=r"HTTP 400: bad request with key \*\*\*") as error:
        scorer.score(grey(0), ["p"], [{}])
    (request,), said = server.requests, [str(error.value) + repr(error.value.__cause__)]
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    server.models = (401, {}, f"wrong key {KEY}")
    with pytest.raises(RewardError, match=r"HTTP 401.*wrong key \*\*\*.*variable TEST_KEY") as error:
        build()
    said.append(str(error.value))
    monkeypatch.setenv("TEST_KEY", f"{KEY}\nX-Other: 1")
    with pytest.raises(RewardError, match="TEST_KEY holds characters") as error:
        build()
    assert KEY not in json.dumps(request.body) + "".join(said) + str(error.value)


def test_without_a_key_none_is_sent_and_a_proxy_is_not_for_this_machine(build, server, monkeypatch):
    monkeypatch.delenv("TEST_KEY")
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert build().score(grey(0), ["p"], [{}])["unifiedreward"].tolist() == [0.8]
    assert "Authorization" not in server.requests[0].headers


def test_options_that_are_none_are_refused(build):
    options = {"concurrency": 0, "retries": -1, "timeout": 0.0, "connect_timeout": -1.0, "backoff": -1.0}
    for option, value in options.items():
        with pytest.raises(RewardError, match=f"{option}={value}"):
            build(**{option: value})


# ---- trouble ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The seconds that were to be waited between repetitions, in place of the waiting."""
    seconds: list[float] = []
    monkeypatch.setattr(urllib3.util.retry, "time", SimpleNamespace(sleep=seconds.append, time=time.time))
    return seconds


def test_a_dead_server_or_one_without_models_is_an_error_at_the_start(build, server, pauses):
    unused = ChatServer()
    unused.server_close()
    with pytest.raises(RewardError, match=f"{unused.address}/v1 does not answer.*python -m sglang.launch_server"):
        build(base_url=unused.address, retries=3, backoff=60.0)
    assert pauses == []
    server.models = (404, {}, "nothing here")
    with pytest.raises(RewardError, match="GET /models with HTTP 404: nothing here"):
        build()


def test_what_passes_is_asked_again(build, server):
    """Busy, broken, or too late."""
    late = threading.Event()

    def answer(number, body):
        if number == 3:
            late.wait(10)
        return {1: (429, {}, "busy"), 2: (500, {}, "busy")}.get(number) or chat("Final Score: 5")

    server.answer = answer
    try:
        assert build(retries=3, timeout=0.5).score(grey(0), ["p"], [{}])["unifiedreward"].tolist() == [1.0]
    finally:
        late.set()
    first, *others = (request.body for request in server.requests)
    assert others == [first] * 3


@pytest.mark.parametrize(
    ("answers", "expected"),
    [([{}] * 4, [3, 6, 12]), ([{"Retry-After": "3"}, {"Retry-After": "86400"}], [3, LONGEST_PAUSE])],
)
def test_repetitions_wait_twice_as_long_each_time_or_as_asked_up_to_a_bound(build, server, pauses, answers, expected):
    """Without a word the first repetition does not wait."""
    server.answer = lambda number, body: (503, answers.pop(0), "") if answers else chat("Final Score: 5")
    build(retries=4, backoff=1.5).score(grey(0), ["p"], [{}])
    assert pauses == expected


def test_a_request_that_fails_for_good_names_server_and_cause(build, server):
    server.answer = lambda number, body: (503, {}, "out of memory")
    scorer = build(retries=1, concurrency=1)
    with pytest.raises(RewardError, match=f"{server.address}/v1 answers.*HTTP 503: out of memory"):
        scorer.score(grey(*range(40)), ["p"] * 40, [{}] * 40)
    assert len(server.requests) < 40  # the images behind the first are given up, but for what was under way
    server.answer = lambda number, body: chat("Final Score: 5")
    assert scorer.score(grey(0), ["p"], [{}])["unifiedreward"].tolist() == [1.0]


def test_a_bad_request_is_not_repeated_and_what_is_no_chat_completion_is_an_error(build, server):
    scorer = build()
    server.answer = lambda number, body: (400, {}, "context too long " * 100)
    with pytest.raises(RewardError, match="HTTP 400: context too long") as error:
        scorer.score(grey(0), ["p"], [{}])
    assert len(server.requests) == 1 and len(str(error.value)) < 500
    for text in ("<html>", "[]", '{"choices": []}', '{"choices": [{"text": "x"}]}', '{"choices": 1}'):
        server.answer = lambda number, body, text=text: (200, {}, text)
        with pytest.raises(RewardError, match="no chat completion"):
            scorer.score(grey(0), ["p"], [{}])
    with pytest.raises(ValueError, match="zip"):
        scorer.score(grey(0, 1), ["p"], [{}] * 2)


@pytest.mark.parametrize("comes_back", [True, False])
def test_training_waits_for_a_server_that_comes_back_and_not_for_ever(build, monkeypatch, comes_back):
    monkeypatch.setattr("diffusionopd.rewards.worker.FIRST_PAUSE", 0.05)
    old = ChatServer()
    with serving(old):
        scorer = build(base_url=old.address, retries=0, connect_timeout=1.0)
    with pytest.raises(RewardError, match=f"{old.address}/v1 does not answer POST.*sglang"):
        scorer.score(grey(0), ["p"], [{}])  # an error, not a score
    worker = RewardWorker(scorer, name="unifiedreward", timeout=60 if comes_back else 0.5, retry_unavailable=True)
    with closing(worker), pytest.warns(UserWarning, match="does not answer POST.*asked again for up to"):
        future = worker.submit(grey(0), ["p"], [{}])
        if comes_back:
            time.sleep(0.3)
            assert not future.done()
            with serving(ChatServer(old.server_address[1])):
                assert future.result()["unifiedreward"].tolist() == [0.8]
        else:
            with pytest.raises(RewardError, match="does not answer.*sglang"):
                future.result()
