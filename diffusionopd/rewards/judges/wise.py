"""WISE (Niu et al., arXiv 2503.07265): prompts that take knowledge of the world, judged with an explanation at hand.

The protocols are those of github.com/PKU-YuanGroup/WISE: `wise`, the paper's, of GPT-4o with three grades an image, and
`wise_verified`, the later one, of Qwen3.5-35B-A3B with a single verdict. What they ask is protocol text, which the
downloader takes from the official clients.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from diffusionopd.rewards.base import (
    NOT_APPLICABLE,
    RewardError,
    UnfitPromptError,
    fetch_command,
    official_file,
    unfit,
)
from diffusionopd.rewards.judges.ask import filled
from diffusionopd.rewards.judges.server import Answer, JudgeServer, Question

CATEGORIES = {
    "Cultural knowledge": "cultural",
    "time": "time",
    "Space": "space",
    "Biology": "biology",
    "Physical Knowledge": "physics",
    "Chemistry": "chemistry",
}
"""As the prompt files name them -> in the names of scores."""

WEIGHTS = {"consistency": 0.7, "realism": 0.2, "aesthetic_quality": 0.1}
"""Of the grades, each from 0 to 2, in a WiScore."""


def category(prompt: str, metadata: Mapping[str, Any]) -> str:
    """The category of a WISE prompt. Raises `UnfitPromptError` for a prompt of another form."""
    if not isinstance(metadata.get("Explanation"), str):
        raise UnfitPromptError("has no 'Explanation', as WISE's prompts have one", prompt)
    if metadata.get("Category") not in CATEGORIES:
        raise UnfitPromptError(f"has no 'Category' of WISE's ({', '.join(CATEGORIES)})", prompt)
    return CATEGORIES[metadata["Category"]]


def read_grades(answer: Answer) -> dict[str, float] | None:
    """The three grades of an answer, by name or one a line; None unless all are there and from 0 to 2."""
    text = answer.text
    named = re.findall(r"(?i)\b(consistency|realism|aesthetic quality)[\s*:：]*([0-2])(?!\d|\.\d)", text)
    found = {name.lower().replace(" ", "_"): float(grade) for name, grade in named}
    if not found and len(lines := re.findall(r"(?m)^\s*([0-2])\s*$", text)) >= len(WEIGHTS):
        found = dict(zip(WEIGHTS, map(float, lines), strict=False))
    return found if found.keys() == WEIGHTS.keys() else None


def read_verdict(answer: Answer) -> dict[str, float] | None:
    """The verdict of an answer, 0 or 1, named or alone on a line; None if there is none."""
    named = re.search(r"(?i)\bscore[\s*:：]*([01])(?!\d|\.\d|/)", answer.text)
    lines = re.findall(r"(?m)^\s*([01])\s*$", answer.text)
    if not named and len(lines) != 1:
        return None
    return {"score": float(named[1] if named else lines[0])}


def load_protocol(reward: str, path: str) -> tuple[str, str]:
    """The system's part of what is asked, and the user's. `RewardError` for a file that is missing or is another."""
    place = official_file(reward, path)
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        system, question = str(content["system"]), str(content["question"])
        if "{prompt}" in question and "{Explanation}" in question:
            return system, question
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise RewardError(f"{path} is not what WISE asks. Remove it and fetch it again: {fetch_command(reward)}")


@dataclass(eq=False)
class Wise(JudgeServer):
    """`wise`: WiScore, (0.7 consistency + 0.2 realism + 0.1 aesthetic quality) / 2, of 0 to 1.

    `wise_consistency`, `wise_realism`, `wise_aesthetic_quality` are the grades, 0 to 2; `wise_<category>` is the score
    of the prompts of a category. The official overall figure weighs categories by their number of prompts: it is the
    mean of `wise` over all 1,000. An image without its grades does not apply; `wise_unparsable` is their share.
    """

    base_url: str = "https://api.openai.com/v1"
    model: str = "gpt-4o-2024-05-13"
    api_key_variable: str = "OPENAI_API_KEY"
    attempts: int = 3
    question: str = "reward_ckpts/wise_question.json"

    name: ClassVar[str] = "wise"
    asks: ClassVar[str] = "question"
    grades: ClassVar[Mapping[str, float]] = {key: weight / 2 for key, weight in WEIGHTS.items()}
    max_tokens: ClassVar[int] = 2000
    read = staticmethod(read_grades)

    def __post_init__(self) -> None:
        """Read what is asked and see that the server is there. Raises `RewardError` as `JudgeServer`."""
        super().__post_init__()
        self._system, self._question = load_protocol(self.name, self.question)

    @classmethod
    def problems(cls, **options: Any) -> list[str]:
        """As `JudgeServer.problems`, with a question that is not there."""
        found = super().problems(**options)
        try:
            load_protocol(cls.name, options.get("question", cls.question))
        except RewardError as error:
            found.append(str(error))
        return found

    check = staticmethod(partial(unfit, category))

    def asked(self, prompt: str, metadata: Mapping[str, Any]) -> list[Question]:
        """As `JudgeServer.asked`."""
        category(prompt, metadata)
        text = filled(self._question, prompt, metadata)
        return [Question(text, self.read, self._system, image_first=False, max_tokens=self.max_tokens)]

    def row(
        self, prompt: str, metadata: Mapping[str, Any], values: Sequence[Mapping[str, float] | None]
    ) -> dict[str, float]:
        """As `JudgeServer.row`."""
        (grades,), own = values, category(prompt, metadata)
        score = sum(weight * grades[key] for key, weight in self.grades.items()) if grades else NOT_APPLICABLE
        row = {self.name: score}
        if len(self.grades) > 1:
            row |= {f"{self.name}_{key}": grades[key] if grades else NOT_APPLICABLE for key in self.grades}
        row |= {f"{self.name}_{each}": score if each == own else NOT_APPLICABLE for each in CATEGORIES.values()}
        return row | {f"{self.name}_unparsable": float(grades is None)}


@dataclass(eq=False)
class WiseVerified(Wise):
    """`wise_verified`: 1 for an image that is right by prompt and explanation, else 0; the rest as `Wise`."""

    base_url: str = "http://127.0.0.1:8000/v1"
    model: str = "Qwen3.5-35B-A3B"
    api_key_variable: str = "JUDGE_API_KEY"
    question: str = "reward_ckpts/wise_verified_question.json"
    extra: Mapping[str, Any] = field(default_factory=lambda: {"chat_template_kwargs": {"enable_thinking": False}})

    name: ClassVar[str] = "wise_verified"
    start: ClassVar[str] = (
        "vllm serve Qwen/Qwen3.5-35B-A3B --served-model-name Qwen3.5-35B-A3B --host 127.0.0.1 --port 8000"
    )
    grades: ClassVar[Mapping[str, float]] = {"score": 1.0}
    max_tokens: ClassVar[int] = 500
    read = staticmethod(read_verdict)
