"""DPG-Bench (Hu et al., arXiv 2403.05135): long prompts, and yes-or-no questions that depend on each other.

The protocol is that of `dpg_bench/compute_dpg_bench.py` of github.com/TencentQQGYLab/ELLA; its judge is mPLUG, a VQA
model that no chat server has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from diffusionopd.rewards.base import NOT_APPLICABLE, Combined, Scores, UnfitPromptError, Weighted, unfit
from diffusionopd.rewards.images import Images, each_uint8
from diffusionopd.rewards.judges.ask import ask_each, mean, yes_or_no
from diffusionopd.rewards.judges.server import JudgeServer, Question, data_url

CATEGORIES = ("global", "entity", "attribute", "relation", "other")
MAX_TOKENS = 16  # of an answer that begins with yes or no


@dataclass(frozen=True)
class Proposition:
    """A question of a prompt; `needs` are the ids of those that must be answered with yes for it to count."""

    id: int
    question: str
    category: str
    needs: tuple[int, ...]


def parse_propositions(prompt: str, metadata: Mapping[str, Any]) -> list[Proposition]:
    """The questions of a line of the prompt file. Raises `UnfitPromptError` for a line of another form."""
    given = metadata.get("questions")
    if not (isinstance(given, list) and given):
        raise UnfitPromptError("has no 'questions', as DPG-Bench's prompts have them", prompt)
    try:
        found = [
            Proposition(int(q["id"]), str(q["question"]), str(q["category"]), tuple(map(int, q["needs"])))
            for q in given
        ]
    except (TypeError, ValueError, LookupError):
        raise UnfitPromptError("has a question without 'id', 'question', 'category' or 'needs'", prompt) from None
    ids = {each.id for each in found}
    if lost := sorted({need for each in found for need in each.needs} - ids - {0}):
        raise UnfitPromptError(f"has questions that need question {lost[0]}, which it lacks", prompt)
    if len(ids) != len(found):
        raise UnfitPromptError("has two questions of one id", prompt)
    return found


def counted(propositions: Sequence[Proposition], yes: Sequence[bool]) -> list[bool]:
    """Which answers count as right: yes, where what they need is right too. In the order of the file, as officially.

    0 among the ids that are needed stands for none.
    """
    right = {each.id: answer for each, answer in zip(propositions, yes, strict=True)}
    for each in propositions:
        right[each.id] = right[each.id] and all(right[need] for need in each.needs if need)
    return [right[each.id] for each in propositions]


@dataclass(eq=False)
class DpgBench(JudgeServer):
    """`dpgbench`: the share of a prompt's questions that are answered with yes and whose needs are, 0 to 1.

    `dpgbench_<category>` is the share of yes among the questions of a category, whatever they need, and of a test set
    among all of them, as officially. An image with an answer that is neither yes nor no does not apply;
    `dpgbench_unparsable` is the share of such answers.
    """

    model: str = "Qwen/Qwen3-VL-8B-Instruct"
    attempts: int = 3

    name: ClassVar[str] = "dpgbench"
    start: ClassVar[str] = "vllm serve Qwen/Qwen3-VL-8B-Instruct --host 127.0.0.1 --port 8000"
    combined: ClassVar[Combined] = {
        f"dpgbench_{category}": Weighted(f"dpgbench_{category}", f"dpgbench_{category}_questions")
        for category in CATEGORIES
    }

    @staticmethod
    def check(prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> dict[int, str]:
        """As `PromptChecker.check`: prompts without DPG-Bench's questions."""
        return unfit(parse_propositions, prompts, metadata)

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`. Raises `UnfitPromptError` for a prompt without questions, first of all."""
        asked = [parse_propositions(prompt, data) for prompt, data in zip(prompts, metadata, strict=True)]
        urls = [data_url(pixels) for pixels in each_uint8(images)]
        questions = [
            [
                Question(url, f"{q.question} Answer yes or no.", max_tokens=MAX_TOKENS, read=yes_or_no)
                for q in propositions
            ]
            for url, propositions in zip(urls, asked, strict=True)
        ]
        rows = []
        for propositions, answers in zip(asked, ask_each(self, questions), strict=True):
            verdicts = [yes_or_no(answer) for answer in answers]
            if None in verdicts:
                self.warn_unreadable(answers[verdicts.index(None)])
            rows.append(_row(propositions, verdicts))
        return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in _row([], [])}


def _row(propositions: Sequence[Proposition], verdicts: Sequence[bool | None]) -> dict[str, float]:
    """The scores of one image."""
    readable, yes = None not in verdicts, [bool(verdict) for verdict in verdicts]
    row = {"dpgbench": mean(counted(propositions, yes)) if readable else NOT_APPLICABLE}
    for category in CATEGORIES:
        own = [
            answer
            for answer, each in zip(yes, propositions, strict=True)
            if each.category.split("-")[0].strip().lower() == category
        ]
        row[f"dpgbench_{category}"] = mean(own) if readable else NOT_APPLICABLE
        row[f"dpgbench_{category}_questions"] = (float(len(own)) or NOT_APPLICABLE) if readable else NOT_APPLICABLE
    return row | {"dpgbench_unparsable": mean([verdict is None for verdict in verdicts])}
