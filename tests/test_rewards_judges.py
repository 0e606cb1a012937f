"""Judges against a chat server on the loopback: the official verdicts from scripted answers, and bad input."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from diffusionopd.evaluation.results import Record, summarise
from diffusionopd.rewards import (
    NOT_APPLICABLE,
    RewardError,
    RewardUnavailableError,
    Scorer,
    UnfitPromptError,
    build_scorer,
    build_scorers,
    check_options,
    check_prompts,
    digests,
)
from diffusionopd.rewards.judges.dpgbench import CATEGORIES, DpgBench
from diffusionopd.rewards.judges.geneval2 import SKILLS, GenEval2
from diffusionopd.rewards.judges.questions import OwnQuestion, load_questions
from diffusionopd.rewards.judges.server import Answer
from diffusionopd.rewards.judges.wise import Wise, WiseVerified, read_grades, read_verdict

from .chat import ChatServer, chat, grey, sent_image, sent_text, serving
from .conftest import ROOT


@pytest.fixture
def server():
    with serving(ChatServer()) as server:
        yield server


def scored(scorer: Scorer, prompts: list[dict]) -> list[dict]:
    """A row of scores for each image: the images are told apart by their grey level, which is their place."""
    texts = [data["prompt"] for data in prompts]
    scores = scorer.score(grey(*range(len(prompts))), texts, prompts)
    assert all(values.dtype == np.float64 and values.shape == (len(prompts),) for values in scores.values())
    return [{name: float(values[i]) for name, values in scores.items()} for i in range(len(prompts))]


def image_number(body: dict) -> int:
    return sent_image(body).getpixel((0, 0))[0]


def means(scorer: Scorer, prompts: list[dict], rows: list[dict]) -> dict:
    records = [Record(i, data["prompt"], {}, row) for i, (data, row) in enumerate(zip(prompts, rows, strict=True))]
    return {name: summary.mean for name, summary in summarise(records, scorer.combined).items()}


# ---- GenEval 2 -------------------------------------------------------------------------------------------------------

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven"]
VOCABULARY = [" ", "1", "2", "3", "4", "5", "6", "7", "No", "no", " No", "YES", "A", "The", "Many", "\n"]
VOCABULARY += ["Yes", "yes", " Yes", " yes"] + [
    form for n in NUMBERS for form in (n, n.capitalize(), f" {n}", f" {n.capitalize()}")
]


def encode(text: str) -> list[int]:
    """As a tokenizer does that has these words, and writes digits one by one."""
    ids = []
    while text:
        token = max((token for token in VOCABULARY if text.startswith(token)), key=len)
        token = " " if text[0] == " " and text[1:2].isdigit() else token
        ids.append(VOCABULARY.index(token))
        text = text[len(token) :]
    return ids


def official_soft_tifa(pairs: list, probabilities: np.ndarray) -> tuple[list[float], list[int]]:
    """`soft_tifa` and `tifa` of the official script: of each question, the answers' first tokens among all tokens."""
    soft, hard = [], []
    for (question, answer), probs in zip(pairs, probabilities, strict=True):
        if question.startswith("How many"):
            number = str(NUMBERS.index(answer) + 1)
            answers = [answer, answer.capitalize(), " " + answer, " " + answer.capitalize(), number, " " + number]
        else:
            answers = ["Yes", "yes", " yes", " Yes"]
        soft.append(sum(probs[encode(each)[0]] for each in answers))
        hard.append(int(VOCABULARY[int(np.argmax(probs))].lower() in answers))
    return soft, hard


GENEVAL2 = [
    {
        "prompt": "four white bicycles in front of a cow", "atom_count": 5,
        "vqa_list": [["How many bicycles are in the image?", "four"], ["Are the bicycles white?", "Yes"],
                     ["Are the bicycles in front of the cow?", "Yes"], ["How many cows are there?", "one"]],
        "skills": ["count", "attribute", "position", "count"],
    },
    {
        "prompt": "two dogs run", "atom_count": 3,
        "vqa_list": [["How many dogs are in the image?", "two"], ["Are the dogs running?", "Yes"],
                     ["Are there any dogs in the image?", "Yes"]],
        "skills": ["count", "verb", "object"],
    },
]  # fmt: skip


@pytest.mark.parametrize("sharpness", [1.0, 12.0])
def test_geneval2_is_the_official_soft_tifa(server, sharpness):
    """From the twenty most probable tokens: what is left out of an answer is less probable than the last of them."""
    rng = np.random.default_rng(0)
    probs = {}
    for i, data in enumerate(GENEVAL2):
        for question, _ in data["vqa_list"]:
            logits = sharpness * rng.normal(size=len(VOCABULARY))
            probs[i, question] = np.exp(logits) / np.exp(logits).sum()

    def answer(number, body):
        assert (body["max_tokens"], body["logprobs"], body["top_logprobs"], body["temperature"]) == (1, True, 20, 0)
        assert sent_text(body).endswith("? Answer in one word.") and sent_image(body).size == (8, 8)
        own = probs[image_number(body), sent_text(body).removesuffix(" Answer in one word.")]
        best = np.argsort(-own)[:20]
        return chat(VOCABULARY[best[0]], {VOCABULARY[i]: own[i] for i in best})

    server.answer = answer
    scorer = GenEval2(server.address)
    assert isinstance(scorer, Scorer)
    rows, atoms = scored(scorer, GENEVAL2), {skill: [] for skill in SKILLS}
    for i, (data, row) in enumerate(zip(GENEVAL2, rows, strict=True)):
        own = [probs[i, question] for question, _ in data["vqa_list"]]
        soft, hard = official_soft_tifa(data["vqa_list"], own)
        left_out = 6 * np.mean([np.sort(each)[-20] for each in own])
        assert abs(row["geneval2_am"] - np.mean(soft)) <= (left_out if sharpness == 1 else 1e-4)
        assert row["geneval2_tifa"] == np.mean(hard) and row["geneval2_am"] > row["geneval2"] > 0
        for p, skill in zip(soft, data["skills"], strict=True):
            atoms[skill].append(p)
        other = [n for n in range(3, 11) if n != data["atom_count"]]
        assert row[f"geneval2_atoms_{data['atom_count']}"] == row["geneval2"]
        assert {row[f"geneval2_atoms_{n}"] for n in other} == {NOT_APPLICABLE}
    for skill in SKILLS if sharpness == 12 else ():
        np.testing.assert_allclose(means(scorer, GENEVAL2, rows)[f"geneval2_{skill}"], np.mean(atoms[skill]), atol=1e-4)


def test_geneval2_with_all_tokens_listed_is_exactly_the_official_one(server):
    lists = [{"four": 0.5, " Four": 0.25, "4": 0.125, " ": 0.0625, "three": 0.0625}, {"Yes": 0.9, " No": 0.1}]
    lists += [{" yes": 0.25, "No": 0.75}, {"one": 0.5, "1": 0.25, "two": 0.25}]
    pairs = [question for question, _ in GENEVAL2[0]["vqa_list"]]
    server.answer = lambda number, body: chat(
        next(iter(lists[pairs.index(sent_text(body)[:-20])])), lists[pairs.index(sent_text(body)[:-20])]
    )
    (row,) = scored(GenEval2(server.address), GENEVAL2[:1])
    soft = [0.9375, 0.9, 0.25, 0.75]
    assert math.isclose(row["geneval2"], math.prod(soft) ** 0.25) and math.isclose(row["geneval2_am"], np.mean(soft))
    assert row["geneval2_tifa"] == 1.0 and row["geneval2_unseen"] == 0.0 and row["geneval2_verb"] == NOT_APPLICABLE
    # Not in the list: at most as probable as the last one in it, and as what it leaves
    lists[2] = {"No": 0.7, "no": 0.2}
    (row,) = scored(GenEval2(server.address), GENEVAL2[:1])
    assert math.isclose(row["geneval2_position"], 0.1) and row["geneval2_unseen"] == 0.25


def test_geneval2_needs_probabilities_of_tokens(server):
    listed = (
        "[]",
        *(f'[{{"top_logprobs": [{{"token": "Yes", "logprob": {p}}}]}}]' for p in ("NaN", "Infinity", "3.0")),
    )
    answers = (f'{{"choices": [{{"message": {{"content": "a"}}, "logprobs": {{"content": {x}}}}}]}}' for x in listed)
    for reply in (chat("Yes"), *((200, {}, answer) for answer in answers)):
        server.answer = lambda number, body, reply=reply: reply
        with pytest.raises(RewardError, match="logprobs"):
            scored(GenEval2(server.address), GENEVAL2[:1])


# ---- DPG-Bench -------------------------------------------------------------------------------------------------------


def official_dpg(questions: list[dict], yes: dict[int, bool]) -> tuple[float, dict[int, float]]:
    """`compute_dpg_one_sample` of the official script: the score, and the answers before any is taken away."""
    scores = {q["id"]: float(yes[q["id"]]) for q in questions}
    before = dict(scores)
    for q in questions:
        for parent in q["needs"]:
            if parent == 0:
                continue
            if scores[parent] == 0:
                scores[q["id"]] = 0
                break
    return sum(scores.values()) / len(scores), before


def test_dpgbench_is_the_official_score_and_categories_are_of_all_questions(server):
    rng, kinds = np.random.default_rng(1), ["entity - whole", "attribute - color", "relation - spatial", "global"]
    prompts, verdicts = [], {}
    for i, count in enumerate((3, 7, 5, 1)):
        ids = rng.permutation(count) + 1  # needs may come later in the file
        questions = [
            {
                "id": int(n), "question": f"Is {n} there?", "category": kinds[rng.integers(4)],
                "needs": [int(rng.integers(1, count + 1)) for _ in range(rng.integers(0, 3))] or [0],
            } for n in ids
        ]  # fmt: skip
        prompts.append({"prompt": f"p{i}", "questions": questions})
        verdicts |= {(i, q["question"]): bool(rng.random() < 0.7) for q in questions}
    words = {True: ["Yes", "yes.", "**Yes**, it is", "<think>No, no</think>\nYes"], False: ["No", "no, none"]}

    def answer(number, body):
        said = verdicts[image_number(body), sent_text(body).removesuffix(" Answer yes or no.")]
        return chat(words[said][number % len(words[said])])

    server.answer = answer
    scorer = DpgBench(server.address)
    rows, pooled = scored(scorer, prompts), {category: [] for category in CATEGORIES}
    for i, (data, row) in enumerate(zip(prompts, rows, strict=True)):
        yes = {q["id"]: verdicts[i, q["question"]] for q in data["questions"]}
        score, before = official_dpg(data["questions"], yes)
        assert math.isclose(row["dpgbench"], score) and row["dpgbench_unparsable"] == 0
        for q in data["questions"]:
            pooled[q["category"].split("-")[0].strip()].append(before[q["id"]])
    found = means(scorer, prompts, rows)
    assert {name for name in CATEGORIES if f"dpgbench_{name}" in found} == {n for n, values in pooled.items() if values}
    for category, values in pooled.items():
        assert not values or math.isclose(found[f"dpgbench_{category}"], np.mean(values))


def test_an_answer_that_is_neither_yes_nor_no_is_asked_again_and_then_does_not_apply(server):
    prompts = [{"prompt": f"p{i}", "questions": [{"id": 1, "question": "Q?", "category": "other", "needs": [0]}]}
               for i in range(2)]  # fmt: skip
    said = {0: ["Perhaps", "", "yes"], 1: ["Perhaps"] * 3}
    server.answer = lambda number, body: chat(said[image_number(body)].pop(0))
    with pytest.warns(UserWarning, match="Perhaps"):
        first, second = scored(DpgBench(server.address, attempts=3), prompts)
    assert said == {0: [], 1: []} and first["dpgbench"] == 1.0
    assert second["dpgbench"] == second["dpgbench_other"] == NOT_APPLICABLE and second["dpgbench_unparsable"] == 1.0


# ---- WISE ------------------------------------------------------------------------------------------------------------

WISE = [
    {"prompt": "a moon food", "Explanation": "mooncakes", "Category": "Cultural knowledge"},
    {"prompt": "ice at 50 degrees", "Explanation": "{melts}", "Category": "Physical Knowledge"},
]
GRADES = {
    "Consistency: 2\nRealism: 1\nAesthetic Quality: 0": (2, 1, 0),
    "**Consistency:** 1\n**Realism**: 2\n**Aesthetic Quality** 2": (1, 2, 2),
    "Consistency: 2.\nRealism: 1.\nAesthetic Quality: 0.": (2, 1, 0),
    "2\n1\n0": (2, 1, 0), "consistency：0, realism：0, aesthetic quality：1": (0, 0, 1),
    "Consistency: 2\nRealism: 1": None, "Consistency: 12\nRealism: 1\nAesthetic Quality: 1": None,
    "Consistency: 3\nRealism: 1\nAesthetic Quality: 1": None, "2\n1": None, "": None,
    "Consistency: 1.5\nRealism: 1\nAesthetic Quality: 1": None,
}  # fmt: skip
VERDICTS = {"Score: 1": 1, "**Score**: 0": 0, "1": 1, "I think so.\nScore: 1.": 1, "Score: 0.5": None,
            "Score: 10": None, "Score: 2": None, "0\n1": None, "Score: 1/5": None, "": None}  # fmt: skip


def test_grades_and_verdicts_are_read_or_not():
    assert {text: tuple(found.values()) if (found := read_grades(Answer(text))) else None for text in GRADES} == GRADES
    assert {text: found["score"] if (found := read_verdict(Answer(text))) else None for text in VERDICTS} == VERDICTS


@pytest.fixture
def wise_question(tmp_path):
    path = tmp_path / "question.json"
    path.write_text(json.dumps({"system": "Be strict.", "question": "P: {prompt}\nE: {Explanation}\n{other: 1}"}))
    return str(path)


def test_wise_asks_and_weighs_as_officially(server, wise_question):
    def answer(number, body):
        system, user = body["messages"]
        assert (system["role"], system["content"][0]["text"]) == ("system", "Be strict.")
        assert [part["type"] for part in user["content"]] == ["text", "image_url"] and body["temperature"] == 0
        data = WISE[image_number(body)]
        assert sent_text(body) == f"P: {data['prompt']}\nE: {data['Explanation']}\n{{other: 1}}"
        if "chat_template_kwargs" in body:
            assert body["chat_template_kwargs"] == {"enable_thinking": False} and body["max_tokens"] == 500
            return chat(f"Score: {image_number(body)}")
        return chat(["Consistency: 2\nRealism: 1\nAesthetic Quality: 0", "I won't"][image_number(body)])

    server.answer = answer
    wise = Wise(server.address, question=wise_question)
    with pytest.warns(UserWarning, match="I won't"):
        rows = scored(wise, WISE)
    assert math.isclose(rows[0]["wise"], (0.7 * 2 + 0.2 * 1 + 0.1 * 0) / 2)
    assert rows[0]["wise_cultural"] == rows[0]["wise"] and rows[0]["wise_physics"] == NOT_APPLICABLE
    assert [rows[0][f"wise_{grade}"] for grade in ("consistency", "realism", "aesthetic_quality")] == [2, 1, 0]
    assert rows[1]["wise"] == rows[1]["wise_realism"] == NOT_APPLICABLE
    assert [row["wise_unparsable"] for row in rows] == [0, 1] and len(server.requests) == 1 + 3
    rows = scored(WiseVerified(server.address, question=wise_question), WISE)
    assert [row["wise_verified"] for row in rows] == [0, 1] and rows[1]["wise_verified_physics"] == 1


def test_wise_without_its_question_is_refused_with_the_command(server, tmp_path):
    (tmp_path / "other.json").write_text('{"system": "", "question": "Rate {prompt}"}')
    for path in ("none.json", "other.json"):
        with pytest.raises(RewardError, match=rf"{path}.*tools\.download rewards wise"):
            Wise(server.address, question=str(tmp_path / path))
    assert server.requests == []


# ---- questions of one's own ------------------------------------------------------------------------------------------

OWN = """
system: You look at pictures. Style - {style}.
questions:
  - name: dog
    ask: "Is there a dog in this picture of {prompt}? Answer yes or no."
    answer: "yes"
  - name: empty
    ask: Is the picture empty? Answer yes or no.
    answer: ["no"]
    weight: 2
  - name: sure
    ask: Is it {style}?
    answer: ["Yes", "Sure"]
    probability: true
  - name: quality
    ask: Rate it.
    number: 'Score: (\\d+)'
    range: [1, 5]
    needs: [dog]
"""
STYLED = [{"prompt": "a {style} dog", "style": "oil"}, {"prompt": "a cat", "style": "ink"}]


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    return path


def test_own_questions_are_asked_and_averaged_as_their_file_says(server, own):
    def answer(number, body):
        i, text = image_number(body), sent_text(body)
        assert body["messages"][0]["content"][0]["text"] == f"You look at pictures. Style - {STYLED[i]['style']}."
        if text.startswith("Is there"):
            assert text == f"Is there a dog in this picture of {STYLED[i]['prompt']}? Answer yes or no."
            return chat(["Yes.", "No."][i])
        if text.startswith("Is it"):
            return chat("Yes", {"Yes": 0.5, " sure": 0.25, "No": 0.25})
        return chat("no" if "empty" in text else "Score: 4")

    server.answer = answer
    build = {"base_url": server.address, "model": "m", "questions": str(own)}
    first, second = scored(build_scorer("judge", options=build), STYLED)
    names = ["judge_dog", "judge_empty", "judge_sure", "judge_quality"]
    assert [first[name] for name in names] == [1, 1, 0.75, 0.75]
    assert math.isclose(first["judge"], (1 + 2 * 1 + 0.75 + 0.75) / 5)
    assert [second[name] for name in names] == [0, 1, 0.75, 0] and math.isclose(second["judge"], 2.75 / 5)
    own.write_text("average: geometric\n" + OWN)
    first, second = scored(build_scorer("judge", options=build), STYLED)
    assert math.isclose(first["judge"], (0.75 * 0.75) ** 0.2) and second["judge"] == 0.0
    drawn = build_scorer("judge", options=build).asked("sks, a dog", STYLED[0])[0].text
    assert "picture of sks, a dog?" in drawn, "the prompt as it is drawn, not as the file has it"


def test_an_image_with_an_answer_that_cannot_be_read_does_not_apply(server, own):
    own.write_text("questions: [{name: q, ask: Rate it., number: '(\\d+)', range: [0, 10]}]")
    said = iter(["8", "11", "11", "11", "?", "<think>7, or", "10"])
    server.answer = lambda number, body: chat(next(said))
    scorer = build_scorer("judge", options={"base_url": server.address, "model": "m", "questions": str(own)})
    with pytest.warns(UserWarning, match="'11'"):
        rows = [scored(scorer, STYLED[:1])[0] for _ in range(3)]
    assert [row["judge"] for row in rows] == [0.8, NOT_APPLICABLE, 1.0] == [row["judge_q"] for row in rows]
    assert [row["judge_unparsable"] for row in rows] == [0, 1, 0]


def test_the_documented_questions_are_read(own):
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8"), re.DOTALL)
    own.write_text(text)
    shown, quality = load_questions(str(own)).questions
    assert shown.read(Answer("Yes", {"Yes": 0.5, " yes": 0.25, "No": 0.25})) == 0.75
    assert shown.read(Answer("No", {"No": 0.9, "The": 0.1})) == 0.0
    assert shown.read(Answer("The", {"The": 0.9, "It": 0.1})) is None, "no answer"
    colour = replace(shown, answer=("red",))
    assert colour.read(Answer("Red", {"Red": 0.5, "No": 0.5})) == 0.5
    assert colour.read(Answer("No", {"No": 0.9, "The": 0.1})) is None, "nothing is known of how probable red is"
    either = OwnQuestion("a", "b", answer=("yes", "correct"))
    assert [either.read(Answer(said)) for said in ("Correct.", "No", "wrong", "")] == [1, 0, None, None]
    assert [quality.read(Answer(said)) for said in ("Score: 4.5", "Score: 6", "fine")] == [0.875, None, None]


BAD = {
    "questions: [": "YAML", "- a": "questions", "questions: []": "questions", "questions: [1]": "question 1",
    "average: harmonic\nquestions: [{name: a b, ask: '', answer: yes}]": r"harmonic.*name.*'ask'.*quote",
    "model: x\nquestions: [{name: a, ask: b, answer: 'yes', number: x}]": "'model'.*either 'answer'",
    "questions: [{name: a, ask: b, answer: [light blue, red, x-ray, '3.5']}]": r"'light blue', 'x-ray', '3\.5'",
    "questions: [{name: a, ask: b, number: '(', range: [5, 1]}]": r"'number'.*range.*\[5, 1\]",
    "questions: [{name: a, ask: b, number: x, range: [1, 2], probability: true}]": "one group.*probability",
    "questions: [{name: a, ask: b, answer: 'yes', needs: [c], weight: 0}]": "weight.*needs c",
    "questions: [{name: a, ask: b, answer: x}, {name: a, ask: b, answer: x, wait: 1}]": "'wait'.*taken",
    "max_tokens: 0\nsystem: 3\nquestions: [{name: a, ask: b, answer: x}]": "max_tokens.*system",
}  # fmt: skip


def test_everything_wrong_with_a_file_of_questions_is_said_at_once_and_nothing_is_run(own, tmp_path):
    for text, facts in BAD.items():
        own.write_text(text)
        with pytest.raises(RewardError, match=f"(?s)own.yaml.*{facts}"):
            check_options({"judge": {"model": "m", "questions": str(own)}})
    alarm = tmp_path / "alarm"
    own.write_text(
        f"questions: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{alarm}]]"
    )
    with pytest.raises(RewardError, match="YAML"):
        check_options({"judge": {"model": "m", "questions": str(own)}})
    assert not alarm.exists()
    with pytest.raises(RewardError, match="questions must be text"):
        check_options({"judge": {"model": "m", "questions": 5}})


# ---- bad input, before time is spent ---------------------------------------------------------------------------------


def test_wrong_options_of_all_judges_are_said_at_once_and_no_server_is_asked(server, own):
    given = {
        "geneval2": {"concurrency": 0, "timeout": "long", "base_url": "ftp://x"},
        "judge": {"base_url": server.address, "questions": str(own) + ".none"},
        "dpgbench": {"question": "x"},
        "wise": {"extra": 3, "api_key_variable": "not a name", "question": "none.json"},
    }
    with pytest.raises(RewardError) as caught:
        check_options(given, ["judge"])
    facts = [
        "concurrency=0",
        "timeout='long'",
        "ftp://x",
        "model must",
        "own.yaml.none",
        "dpgbench",
        "extra",
        "none.json",
    ]
    assert [fact for fact in [*facts, "api_key_variable"] if fact not in str(caught.value)] == []
    with pytest.raises(RewardError, match="YAML file"):
        check_options({}, ["judge"])
    assert server.requests == []
    check_options({"judge": {"model": "m", "questions": str(own), "base_url": server.address}}, ["geneval2"])


def test_prompts_without_what_judges_need_are_found_by_the_file_and_by_the_question(own):
    wrong = {
        "geneval2": [{}, {"vqa_list": [], "skills": []}, {"vqa_list": [["a", "b"]], "skills": ["x"]},
                     {"vqa_list": [["a"]], "skills": ["object"]}],
        "dpgbench": [{}, {"questions": [{}]},
                     {"questions": [{"id": 1, "question": "q", "category": "c", "needs": [2]}]}],
        "wise": [{"Category": "time"}, {"Explanation": "e", "Category": "x"}],
        "judge": [{}],
    }  # fmt: skip
    right = {"geneval2": GENEVAL2[0], "wise": WISE[0], "judge": STYLED[0],
             "dpgbench": {"questions": [{"id": 1, "question": "q", "category": "c", "needs": [0]}]}}  # fmt: skip
    options = {"judge": {"questions": str(own)}}
    for name, metadata in wrong.items():
        found = check_prompts([name], ["p"] * (len(metadata) + 1), [*metadata, right[name]], options)
        assert list(found) == list(range(len(metadata))), name
    assert "'style'" in found[0]
    with pytest.raises(UnfitPromptError, match="vqa_list"):
        GenEval2.asked(None, "p", {})


def test_servers_that_are_not_there_or_lack_the_model_are_all_named_before_anything_else(server, own):
    unused = ChatServer()
    unused.server_close()
    options = {"geneval2": {"base_url": unused.address}, "dpgbench": {"base_url": unused.address}}
    with pytest.raises(RewardUnavailableError) as caught:
        build_scorers(["geneval2", "dpgbench"], options=options)
    assert str(caught.value).count(unused.address) == 2 and "vllm serve" in str(caught.value)
    server.models = (200, {}, json.dumps({"data": [{"id": "served"}]}))
    options = {"geneval2": {"base_url": server.address}, "judge": {"base_url": server.address, "model": "served"}}
    options["judge"]["questions"] = str(own)
    with pytest.raises(RewardError, match="no model 'Qwen/Qwen3-VL-8B-Instruct', but served"):
        build_scorers(["geneval2"], options=options)
    assert build_scorers(["judge"], options=options).keys() == {"judge"}


def test_what_an_evaluation_depends_on_holds_the_questions_themselves(own):
    options = {"questions": str(own)}
    before = digests("judge", options)
    own.write_text(OWN.replace("weight: 2", "weight: 3"))
    assert len(before) == 1 and digests("judge", options) != before and digests("geneval2", {}) == []
    assert digests("unifiedreward", {"question": str(own)}) == digests("judge", options)
    assert digests("hpsv3", {"instruction": str(own)}) == digests("judge", options)
