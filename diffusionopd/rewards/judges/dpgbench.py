"""DPG-Bench (Hu et al., arXiv 2403.05135): long prompts, and yes-or-no questions that depend on each other.

The protocol is that of `dpg_bench/compute_dpg_bench.py` of github.com/TencentQQGYLab/ELLA; its judge is mPLUG, a VQA
model that no chat server has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from diffusionopd.rewards.base import NOT_APPLICABLE, Combined, UnfitPromptError, Weighted, unfit
from diffusionopd.rewards.judges.ask import mean, yes_or_no
from diffusionopd.rewards.judges.server import JudgeServer, Question

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
            Proposition(int(q["id"]), str(q["question"]), _category(str(q["category"])), tuple(map(int, q["needs"])))
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


def _category(text: str) -> str:
    """One of `CATEGORIES` from "entity - whole"."""
    return text.split("-")[0].strip().lower()


def counted(answers: Sequence[tuple[Proposition, bool]]) -> list[bool]:
    """Which answers count as right: yes, where what they need is right too. In the order of the file, as officially.

    0 among the ids that are needed stands for none.
    """
    right = {each.id: yes for each, yes in answers}
    for each, yes in answers:
        right[each.id] = yes and all(right[need] for need in each.needs if need)
    return list(right.values())


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
    combined: ClassVar[Combined] = {
        f"dpgbench_{category}": Weighted(f"dpgbench_{category}", f"dpgbench_{category}_questions")
        for category in CATEGORIES
    }

    check = staticmethod(partial(unfit, parse_propositions))

    def asked(self, prompt: str, metadata: Mapping[str, Any]) -> list[Question]:
        """As `JudgeServer.asked`."""
        asked = parse_propositions(prompt, metadata)
        return [Question(f"{each.question} Answer yes or no.", yes_or_no, max_tokens=MAX_TOKENS) for each in asked]

    def row(self, prompt: str, metadata: Mapping[str, Any], values: Sequence[bool | None]) -> dict[str, float]:
        """As `JudgeServer.row`."""
        asked, unreadable = parse_propositions(prompt, metadata), [value is None for value in values]
        answers = [] if any(unreadable) else [(each, bool(value)) for each, value in zip(asked, values, strict=True)]
        row = {"dpgbench": mean(counted(answers)), "dpgbench_unparsable": mean(unreadable)}
        for category in CATEGORIES:
            own = [yes for each, yes in answers if each.category == category]
            row[f"dpgbench_{category}"] = mean(own)
            row[f"dpgbench_{category}_questions"] = float(len(own)) or NOT_APPLICABLE
        return row
