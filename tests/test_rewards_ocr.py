"""The reading reward: its formula, what prompts ask for, the real engine on rendered text, and PaddleOCR's two APIs."""

import sys
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from diffusionopd.rewards import RewardError, UnfitPromptError, build_scorer
from diffusionopd.rewards.ocr import Ocr, ocr_reward
from diffusionopd.rewards.quotes import normalised, quoted, wanted_text
from tools.prompts.ocr import generate

pytest.importorskip("rapidocr")
pytest.importorskip("rapidfuzz")


def rendered(text: str) -> Image.Image:
    image = Image.new("RGB", (384, 384), "white")
    ImageDraw.Draw(image).text((24, 160), text, fill="black", font=ImageFont.load_default(44))
    return image


def test_reward_is_one_minus_the_clipped_edit_distance():
    rewards = {"hello": 1.0, "sayhelloagain": 1.0, "hallo": 0.8, "hell": 0.8, "": 0.0, "somethingverylong": 0.0}
    for read, reward in rewards.items():
        assert ocr_reward(read, "hello") == pytest.approx(reward)


# By kind: straight and curly, of other languages, singles and apostrophes, inches and feet, nesting, escapes, odd ones.
WANTED = {
    'a shop called "Open Late"': "openlate",
    "a shop called “Open Late”": "openlate",
    'A "Café" in the rain': "café",
    'first "A1" then "B2"': "a1",
    'says" HELLO "today': "hello",
    "don't mind: \"it's fine\"": "it'sfine",
    "ein Schild mit „Straße“": "straße",
    "ein Schild mit „Straße”": "straße",
    "ein Schild mit »Straße«": "straße",
    "ein Schild mit ‚Straße‘ hier": "straße",
    "en skylt ”HEJ” här": "hej",
    "une affiche « CAFÉ » et « BAR »": "café",
    "une affiche ‹CAFÉ›": "café",
    "a sign ＂SALE＂": "sale",
    "看板「営業中」と『本日』": "営業中",
    "写着“你好”和“世界”的牌子": "你好",
    '写着"你好"和"世界"的牌子': "你好",
    "写着'你好'的牌子": "你好",
    "a sign ``EXIT''": "exit",
    "a sign ''EXIT''": "exit",
    "a shop called 'Open Late', at night": "openlate",
    "the baker's shop called ‘Joe’s Bread’": "joe'sbread",
    "the baker's sign 'NO 7'": "no7",
    "text 'A' and 'B'": "a",
    "a mug with the words 'DON'T PANIC'": "don'tpanic",
    "a jukebox that says 'Rock 'n' Roll'": "rock'n'roll",
    "a jukebox that says 'Rock 'n Roll' and 'Jazz'": "rock'nroll",
    "'It's 5 o'clock'": "it's5o'clock",
    "the '90s rock 'n' roll bar 'OPEN'": "open",
    "a sign 'Til Dawn'": "tildawn",
    "the letter 'n'": "n",
    'a 24" monitor on a desk that shows "HELLO"': "hello",
    "a 24” monitor and a 5” pipe with “NEWS”": "news",
    'a shop window with “OPEN” above a 3" pipe and a 5" pipe': "open",
    'a 5½" pipe, a 12"x18" poster: "SALE"': "sale",
    'a 5\'10" man holding "HI"': "hi",
    "a 6' tall man with a sign 'HI'": "hi",
    'a door with "ROOM 24" and a sign': "room24",
    'a banner "She said "yes" today"': 'shesaid"yes"today',
    "“outer “inner” rest”": 'outer"inner"rest',
    '“Say "please"” sign': 'say"please"',
    "「外『内』外」": "外『内』外",
    "'She said \"HI\" today'": "hi",
    r'a banner "She said \"yes\" today"': 'shesaid"yes"today',
    r"a sign that says \"HELLO\"": "hello",
    r"a sign 'DON\'T PANIC'": "don'tpanic",
    r'a prompt "C:\"': "c:\\",
    '“OPEN" at night': "open",
    '"OPEN” at night': "open",
    "“A“ and “B“": "a",
    'a sign "" and "SALE"': "sale",
    'a sign "SALE': "sale",
}


def test_the_quoted_text_is_wanted():
    assert {prompt: wanted_text(prompt) for prompt in WANTED} == WANTED


def test_ordinary_prompts_are_read_as_upstream_reads_them():
    prompts = generate(300, seed=1)
    assert [wanted_text(prompt) for prompt in prompts] == ["".join(p.split('"')[1].split()).lower() for p in prompts]


def test_a_prompt_that_wants_no_text_is_named_beforehand_and_when_scored():
    bad = ["a red sign", 'a sign ""', 'a sign "  "', "the baker's sign", 'a 24" monitor, a 5" pipe', "a sign '\u200b'"]
    for prompt in bad:
        with pytest.raises(UnfitPromptError) as error:
            wanted_text(prompt)
        assert repr(prompt) in str(error.value) and error.value.prompt == prompt
    assert Ocr.check(['a "good" one', *bad], [{}] * 7).keys() == set(range(1, 7))


def test_what_is_unclear_is_said_once():
    clear = ['a "good" one', 'the same "HI" and “Hi”', "it's a 'fine' baker's"]
    assert all(not quoted(prompt).unclear for prompt in clear)
    with pytest.warns(UserWarning, match="'A'.*2 more") as said:
        assert Ocr.check([*clear, "'A' and 'B'", '"A" and "B"', 'a "sale'], [{}] * 6) == {}
    assert len(said) == 1


def test_equal_texts_look_equal():
    """Spaces and case, composition, width, quotes, ligatures, what has no width: on both sides."""
    pairs = {
        " Step\tGoal\n42 ": "stepgoal42",
        unicodedata.normalize("NFD", "Café Zürich"): "Café Zürich",
        "ＳＡＬＥ\u3000５０％": "sale50%",
        "Don’t": "DON'T",
        "SA\u200bLE\ufeff\u00ad": "sale",
        "“ﬁn…”": '"fin..."',
    }
    for one, other in pairs.items():
        assert ocr_reward(normalised(one), wanted_text(f"a sign 「{other}」")) == 1
        assert ocr_reward(normalised(other), wanted_text(f"a sign 「{one}」")) == 1
    assert normalised("Step") != normalised("Stop")


# ---- RapidOCR --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rapidocr():
    return build_scorer("ocr")


def test_the_engine_reads_rendered_text(rapidocr):
    images = [rendered("HELLO 2024"), rendered("HELLO 2034"), rendered("")]
    scores = rapidocr.score(images, ['a sign "Hello 2024"'] * 3, [{}] * 3)["ocr"]
    np.testing.assert_allclose(scores, [1.0, 8 / 9, 0.0])


def test_a_wrong_letter_of_n_costs_one_nth(rapidocr):
    for text, at in (("OPEN LATE", 0), ("Spring Sale", 5), ("Gate 42", -1)):
        letters = list(text)
        letters[at] = "X"
        images = [rendered(text), rendered("".join(letters))]
        scores = rapidocr.score(images, [f'a sign "{text}"'] * 2, [{}] * 2)["ocr"]
        np.testing.assert_allclose(scores, [1.0, 1 - 1 / len(normalised(text))])


def test_what_the_engine_cannot_read_is_named_once(rapidocr):
    with pytest.warns(UserWarning) as said:
        for _ in range(2):
            rapidocr.score([rendered("HELLO")] * 2, ['"HELLO ЖЖ 日"', "“Don’t”"], [{}] * 2)
    assert len(said) == 1 and "ж" in str(said[0].message) and "日" not in str(said[0].message)


def test_an_empty_image_is_read_as_nothing(rapidocr):
    images = [Image.new("RGB", size, "navy") for size in ((512, 512), (8, 8))]
    assert rapidocr.score(images, ['a sign "Hello"'] * 2, [{}] * 2)["ocr"].tolist() == [0.0, 0.0]


def test_the_engine_is_given_bgr(monkeypatch):
    seen = []

    def engine(pixels):
        seen.append(pixels)
        return SimpleNamespace(txts=None)

    monkeypatch.setattr("rapidocr.RapidOCR", lambda params: engine)
    assert Ocr().read(np.full((2, 2, 3), (1, 2, 3), dtype=np.uint8)) == ""
    assert seen[0][0, 0].tolist() == [3, 2, 1] and seen[0].flags["C_CONTIGUOUS"]


def test_what_the_engine_raises_is_no_score(monkeypatch):
    def broken(pixels):
        raise RuntimeError("engine is broken")

    monkeypatch.setattr("rapidocr.RapidOCR", lambda params: broken)
    with pytest.raises(RuntimeError, match="engine is broken"):
        Ocr().score([rendered("A")], ['"A"'], [{}])


# ---- PaddleOCR, by stand-ins with the arguments and results that its documentation gives ----------------------------


class Paddle3:
    """3.x: refuses arguments it does not know; one mapping an image, with empty lists where there is no text.

    By default it gives every line, however unsure.
    """

    def __init__(self, *, lang=None, ocr_version=None, device=None, use_doc_orientation_classify=None,
                 use_doc_unwarping=None, use_textline_orientation=None, text_det_limit_side_len=None,
                 text_det_limit_type=None, text_rec_score_thresh=0.0, enable_mkldnn=None):  # fmt: skip
        self.made = {name: value for name, value in locals().items() if name != "self"}
        Paddle3.last = self

    def predict(self, input, **_):
        lines = {"Hello": 0.9, "he11o": 0.3, "Wor ld": 0.8} if input.any() else {}
        sure = {text: score for text, score in lines.items() if score >= self.made["text_rec_score_thresh"]}
        return [{"input_path": None, "rec_texts": [*sure], "rec_scores": [*sure.values()], "rec_polys": []}]

    def ocr(self, img, **kwargs):
        return self.predict(img, **kwargs)  # `cls` would be refused here


class Paddle2:
    """2.x: takes any argument; per image a list of [box, (text, confidence)], or None where there is no text.

    By default it gives no line of a confidence below 0.5.
    """

    def __init__(self, **made):
        self.made = made
        Paddle2.last = self

    def ocr(self, img, det=True, rec=True, cls=True):
        assert not cls, "the direction classifier is not loaded"
        box = [[0.0, 0.0], [9.0, 0.0], [9.0, 5.0], [0.0, 5.0]]
        return [[[box, ("Hello", 0.9)], [box, ("Wor ld", 0.8)]] if img.any() else None]


@pytest.fixture
def paddle(monkeypatch):
    def install(engine: type, cuda: bool = False):
        device = SimpleNamespace(is_compiled_with_cuda=lambda: cuda)
        monkeypatch.setitem(sys.modules, "paddle", SimpleNamespace(device=device))
        monkeypatch.setitem(sys.modules, "paddleocr", SimpleNamespace(PaddleOCR=engine))
        return engine

    return install


@pytest.mark.parametrize("engine", [Paddle2, Paddle3])
def test_paddleocr_is_read_through_either_api(paddle, engine):
    paddle(engine)
    images = np.stack([np.full((8, 8, 3), 255, np.uint8), np.zeros((8, 8, 3), np.uint8)])
    scores = build_scorer("ocr", options={"engine": "paddleocr"}).score(images, ['a sign "hello world"'] * 2, [{}] * 2)[
        "ocr"
    ]
    np.testing.assert_allclose(scores, [1.0, 0.0])
    assert engine.last.made["lang"] == "en" and engine.last.made["ocr_version"] == "PP-OCRv4"
    if engine is Paddle3:
        detector = [engine.last.made[f"text_det_limit_{name}"] for name in ("side_len", "type")]
        assert detector == [960, "max"], "as 2.x by default"


def test_paddleocr_runs_where_paddle_can(paddle):
    for device, cuda, place_2, place_3 in (
        ("cpu", True, (False, 0), "cpu"),
        ("cuda", True, (True, 0), "gpu:0"),
        ("cuda:3", True, (True, 3), "gpu:3"),
        ("cuda:3", False, (False, 0), "cpu"),
    ):
        paddle(Paddle2, cuda)
        Ocr("paddleocr", device)
        assert (Paddle2.last.made["use_gpu"], Paddle2.last.made["gpu_id"]) == place_2
        paddle(Paddle3, cuda)
        Ocr("paddleocr", device)
        assert Paddle3.last.made["device"] == place_3


@pytest.mark.parametrize("missing", ["paddle", "paddleocr"])
def test_missing_paddle_names_the_command(paddle, monkeypatch, missing):
    paddle(Paddle3)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(RewardError, match=rf"{missing}.*pip install -e '\.\[paddle\]'") as error:
        build_scorer("ocr", options={"engine": "paddleocr"})
    assert "[ocr]" not in str(error.value)
