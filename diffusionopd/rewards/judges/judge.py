"""`judge`: a vision-language model that is asked questions of one's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from diffusionopd.rewards.base import NOT_APPLICABLE, RewardError, Scores, unfit
from diffusionopd.rewards.images import Images, each_uint8
from diffusionopd.rewards.judges.ask import ask_each, filled
from diffusionopd.rewards.judges.questions import Questionnaire, load_questions
from diffusionopd.rewards.judges.server import Answer, JudgeServer, Question, data_url


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

    def __post_init__(self) -> None:
        """Read the questions and see that the server is there. Raises `RewardError` as `JudgeServer`."""
        super().__post_init__()
        self._asked = load_questions(self.questions)

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

    @classmethod
    def files(cls, options: Mapping[str, Any]) -> list[str]:
        """The files that the scores depend on."""
        return [options.get("questions", "")]

    @staticmethod
    def check_with(
        options: Mapping[str, Any], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[int, str]:
        """As `PromptChecker.check`: prompts that lack what the questions name."""
        asked = load_questions(options.get("questions", ""))
        template = "\n".join(each.ask for each in asked.questions) + asked.system
        return unfit(lambda prompt, data: filled(template, prompt, data), prompts, metadata)

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`. Raises `UnfitPromptError` for a prompt that lacks what a question names, first of all."""
        pairs = list(zip(prompts, metadata, strict=True))
        texts = [[filled(each.ask, *pair) for each in self._asked.questions] for pair in pairs]
        systems = [filled(self._asked.system, *pair) for pair in pairs]
        questions = [
            [
                Question(
                    url, text, system, max_tokens=self._asked.max_tokens, probabilities=each.probability, read=each.read
                )
                for each, text in zip(self._asked.questions, own, strict=True)
            ]
            for url, own, system in zip(map(data_url, each_uint8(images)), texts, systems, strict=True)
        ]
        rows = [self._row(answers) for answers in ask_each(self, questions)]
        names = [self.name, *(f"{self.name}_{each.name}" for each in self._asked.questions), f"{self.name}_unparsable"]
        return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in names}

    def _row(self, answers: Sequence[Answer]) -> dict[str, float]:
        """The scores of one image."""
        found = [each.read(answer) for each, answer in zip(self._asked.questions, answers, strict=True)]
        row = {f"{self.name}_unparsable": float(np.mean([value is None for value in found]))}
        if None in found:
            self.warn_unreadable(answers[found.index(None)])
            left_out = [self.name, *(f"{self.name}_{each.name}" for each in self._asked.questions)]
            return row | dict.fromkeys(left_out, NOT_APPLICABLE)
        values = after_needs(self._asked, [float(value or 0.0) for value in found])
        row |= {f"{self.name}_{each.name}": value for each, value in zip(self._asked.questions, values, strict=True)}
        return row | {self.name: mean(self._asked, values)}


def after_needs(asked: Questionnaire, values: Sequence[float]) -> list[float]:
    """The values, with 0 for a question that needs one of less than one half."""
    counted: dict[str, float] = {}
    for each, value in zip(asked.questions, values, strict=True):
        counted[each.name] = value if all(counted[need] >= 0.5 for need in each.needs) else 0.0
    return list(counted.values())


def mean(asked: Questionnaire, values: Sequence[float]) -> float:
    """The weighted mean of the kind that the file names; the geometric one is 0 where a value is."""
    weights = np.array([each.weight for each in asked.questions], dtype=np.float64)
    shares = weights / weights.sum()
    if asked.average == "arithmetic":
        return float(shares @ np.asarray(values, dtype=np.float64))
    return float(np.exp(shares @ np.log(values))) if min(values) > 0 else 0.0
