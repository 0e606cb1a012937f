"""GenEval 2 (Kamath et al., arXiv 2512.16853): Soft-TIFA, the probability that a VQA model gives the right answers.

The protocol is that of `evaluation.py` and `soft_tifa_analysis.py` of github.com/facebookresearch/GenEval2, whose judge
is Qwen3-VL-8B-Instruct: each question with "Answer in one word.", the image at its own size; the score of a question is
the probability, as the first token of the answer, of the ways to write the right word. Here it comes from the server's
list of most probable first tokens.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from diffusionopd.rewards.base import NOT_APPLICABLE, Combined, UnfitPromptError, Weighted, unfit
from diffusionopd.rewards.judges.ask import mean
from diffusionopd.rewards.judges.server import Answer, JudgeServer, Question

SKILLS = ("object", "attribute", "count", "position", "verb")
ATOMS = range(3, 11)
_NUMBERS = dict(zip("one two three four five six seven eight nine ten".split(), map(str, range(1, 11)), strict=True))


@dataclass(frozen=True)
class Atom:
    """One question of a prompt, its right answer in words, and its skill."""

    question: str
    answer: str
    skill: str


def parse_atoms(prompt: str, metadata: Mapping[str, Any]) -> list[Atom]:
    """The questions of a line of `geneval2_data.jsonl`. Raises `UnfitPromptError` for a line of another form."""
    pairs, skills = metadata.get("vqa_list"), metadata.get("skills")
    if not (isinstance(pairs, list) and isinstance(skills, list) and pairs and len(pairs) == len(skills)):
        raise UnfitPromptError("has no 'vqa_list' with as many 'skills', as GenEval 2's prompts have them", prompt)
    atoms = []
    for pair, skill in zip(pairs, skills, strict=True):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(each, str) for each in pair)):
            raise UnfitPromptError(f"has {pair!r} in its 'vqa_list', not [question, answer]", prompt)
        if skill not in SKILLS:
            raise UnfitPromptError(f"has the skill {skill!r}, not one of {', '.join(SKILLS)}", prompt)
        atoms.append(Atom(pair[0], pair[1], skill))
    return atoms


def right_answers(atom: Atom) -> list[str]:
    """The ways to write the right answer that count, officially."""
    if not atom.question.startswith("How many"):
        return ["Yes", "yes", " yes", " Yes"]
    word, number = atom.answer, _NUMBERS.get(atom.answer, "other")
    return [word, word.capitalize(), f" {word}", f" {word.capitalize()}", number, f" {number}"]


def first_tokens(answers: Sequence[str]) -> frozenset[str]:
    """The first token of each, as Qwen's vocabulary has them: these words are one each, and digits, and a blank.

    So of " 4" it is the blank, which officially counts as right, and of "10" the 1.
    """
    return frozenset(re.match(r"\d| (?=\d)|.*", answer)[0] for answer in answers)  # type: ignore[index]


def probability(answer: Answer, tokens: frozenset[str]) -> tuple[float, bool]:
    """The probability of the tokens, and whether any of them is in the server's list.

    Of tokens that are not there it is known that each is less probable than the last that is, and all together have
    what the list leaves. That bound is taken: with 0 in its place, the geometric mean would be 0.
    """
    if listed := [p for token, p in answer.first.items() if token in tokens]:
        return min(sum(listed), 1.0), True
    return min(min(answer.first.values(), default=0.0), max(0.0, 1.0 - sum(answer.first.values()))), False


@dataclass(eq=False)
class GenEval2(JudgeServer):
    """`geneval2`: Soft-TIFA GM, the geometric mean of the probabilities of a prompt's right answers, 0 to 1.

    `geneval2_am` is their arithmetic mean, `geneval2_tifa` the share of questions whose most probable answer is right;
    `geneval2_<skill>` the arithmetic mean over the questions of one skill, and of a test set over all of its questions;
    `geneval2_atoms_<n>` is `geneval2` of the prompts with n atoms. `geneval2_unseen` is the share of questions of whose
    right answer the server gave a bound only.
    """

    model: str = "Qwen/Qwen3-VL-8B-Instruct"

    name: ClassVar[str] = "geneval2"
    combined: ClassVar[Combined] = {
        f"geneval2_{skill}": Weighted(f"geneval2_{skill}", f"geneval2_{skill}_questions") for skill in SKILLS
    }

    check = staticmethod(partial(unfit, parse_atoms))

    def asked(self, prompt: str, metadata: Mapping[str, Any]) -> list[Question]:
        """As `JudgeServer.asked`."""
        return [
            Question(f"{atom.question} Answer in one word.", partial(_read, right_answers(atom)), probabilities=True)
            for atom in parse_atoms(prompt, metadata)
        ]

    def row(
        self, prompt: str, metadata: Mapping[str, Any], values: Sequence[tuple[float, bool, bool]]
    ) -> dict[str, float]:
        """As `JudgeServer.row`."""
        soft, seen, hard = np.array(values, dtype=np.float64).T
        with np.errstate(divide="ignore"):
            geometric = float(np.exp(np.log(soft).mean()))
        row = {"geneval2": geometric, "geneval2_am": mean(soft), "geneval2_tifa": mean(hard)}
        for skill in SKILLS:
            own = soft[[atom.skill == skill for atom in parse_atoms(prompt, metadata)]]
            row[f"geneval2_{skill}"] = mean(own)
            row[f"geneval2_{skill}_questions"] = float(len(own)) or NOT_APPLICABLE
        row |= {f"geneval2_atoms_{n}": geometric if metadata.get("atom_count") == n else NOT_APPLICABLE for n in ATOMS}
        return row | {"geneval2_unseen": mean(1 - seen)}


def _read(right: Sequence[str], answer: Answer) -> tuple[float, bool, bool]:
    """As `probability` of the right answers, and whether the most probable answer is one of them ("YES" is one too)."""
    return *probability(answer, first_tokens(right)), answer.text.lower() in right
