"""`judge`: a vision-language model that is asked questions of one's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from diffusionopd.rewards.base import NOT_APPLICABLE, RewardError, unfit
from diffusionopd.rewards.judges.ask import filled
from diffusionopd.rewards.judges.questions import Questionnaire, load_questions
from diffusionopd.rewards.judges.server import JudgeServer, Question


@dataclass(eq=False)
class Judge(JudgeServer):
    """`judge`: the weighted mean, arithmetic or geometric, of what the answers to a file's questions say, 0 to 1.

    `judge_<name>` is the score of one question, after what it needs: 0 where a question that it needs has less than one
    half. An image with an answer that cannot be read does not apply; `judge_unparsable` is the share of such answers.

    questions: the YAML file (docs/rewards.md). The other options are those of `JudgeServer`.
    """

    questions: str = ""
    attempts: int = 3

    name: ClassVar[str] = "judge"
    asks: ClassVar[str] = "questions"

    def __post_init__(self) -> None:
        """Read the questions and see that the server is there. Raises `RewardError` as `JudgeServer`."""
        super().__post_init__()
        self._file = load_questions(self.questions)

    @classmethod
    def problems(cls, **options: Any) -> list[str]:
        """As `JudgeServer.problems`, with everything that is wrong with the file of questions."""
        found = super().problems(**options)
        if not options.get("questions"):
            return [*found, "questions must name a YAML file"]
        try:
            load_questions(options["questions"])
        except RewardError as error:
            found.append(str(error))
        return found

    @staticmethod
    def check_with(
        options: Mapping[str, Any], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[int, str]:
        """As `unfit`: prompts that lack what the questions name."""
        asked = load_questions(options.get("questions", ""))
        template = "\n".join(each.ask for each in asked.questions) + asked.system
        return unfit(lambda prompt, data: filled(template, prompt, data), prompts, metadata)

    def asked(self, prompt: str, metadata: Mapping[str, Any]) -> list[Question]:
        """As `JudgeServer.asked`."""
        fill, tokens = partial(filled, prompt=prompt, metadata=metadata), self._file.max_tokens
        return [
            Question(
                fill(each.ask), each.read, fill(self._file.system), max_tokens=tokens, probabilities=each.probability
            )
            for each in self._file.questions
        ]

    def row(self, prompt: str, metadata: Mapping[str, Any], values: Sequence[float | None]) -> dict[str, float]:
        """As `JudgeServer.row`."""
        unparsable = {f"{self.name}_unparsable": float(np.mean([value is None for value in values]))}
        if None in values:
            own = [f"{self.name}_{each.name}" for each in self._file.questions]
            return dict.fromkeys([self.name, *own], NOT_APPLICABLE) | unparsable
        counted = after_needs(self._file, [value or 0.0 for value in values])
        parts = {f"{self.name}_{name}": value for name, value in counted.items()}
        return {self.name: mean(self._file, list(counted.values()))} | parts | unparsable


def after_needs(asked: Questionnaire, values: Sequence[float]) -> dict[str, float]:
    """The values by the questions' names, with 0 for a question that needs one of less than one half."""
    counted: dict[str, float] = {}
    for each, value in zip(asked.questions, values, strict=True):
        counted[each.name] = value if all(counted[need] >= 0.5 for need in each.needs) else 0.0
    return counted


def mean(asked: Questionnaire, values: Sequence[float]) -> float:
    """The weighted mean of the kind that the file names; the geometric one is 0 where a value is."""
    weights = [each.weight for each in asked.questions]
    if asked.average == "arithmetic":
        return float(np.average(values, weights=weights))
    return float(np.exp(np.average(np.log(values), weights=weights))) if min(values) > 0 else 0.0
