"""UnifiedReward (arXiv:2503.05236): a vision-language model behind a server says how good an image of a caption is.

The protocol is that of the official client (`sglang_inference.py`, github.com/CodeGoat24/UnifiedReward): the image at
512x512, then the question, temperature 0; the number after "Final Score:" over 5. Any OpenAI-compatible server will do.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffusionopd.files import located
from diffusionopd.rewards.base import NOT_APPLICABLE, RewardError, fetch_command
from diffusionopd.rewards.judges.server import JudgeServer, Question

QUESTION = "reward_ckpts/unifiedreward_question.txt"
"""The official question: UTF-8 text in which `{prompt}` stands for the caption. No other brace has a meaning."""

OWN_QUESTION = (
    "The picture was made for the caption below. Judge it by two things: how closely it follows the caption (which "
    "objects are there, how many, with what attributes, and how they relate), and how good it is as a picture (sharp, "
    "detailed, true in colour, pleasing). Write your overall judgement as a number from 1 (bad) to 5 (excellent) after "
    '"Final Score:".\nCaption: [{prompt}]'
)
"""What is asked without that file."""

START = (
    "python -m sglang.launch_server --model-path CodeGoat24/UnifiedReward-7b-v1.5 --served-model-name "
    "UnifiedReward-7b-v1.5 --port 17140 --chat-template chatml-llava --mem-fraction-static 0.85"
)
"""The command that starts the server of the defaults; sglang is best installed in an environment of its own."""

_FINAL_SCORE = re.compile(
    r"""final \s+ score [\s*_:='"`\[]* (\d+(?:\.\d+)?)      # the number, perhaps bold or in quotes
        (?:[ *_]* (?:/|out\ of) \s* 5(?:\.0+)?)?          # of 5
        (?! [.,]?\d                                       # but no longer number (45),
          | [ *_]* (?:[-–/]|out\ of) \s* \d               # nor a range (1-5) or another scale (4/10)
          | \s* % )""",
    re.IGNORECASE | re.VERBOSE,
)


def final_score(answer: str) -> float | None:
    """The number from 1 to 5 after the first "Final Score:" of an answer; None if there is none such."""
    match = _FINAL_SCORE.search(answer)
    value = float(match.group(1)) if match else 0.0
    return value if 1 <= value <= 5 else None


def load_question(path: str) -> str:
    """The question of a file, without line breaks at its end; without the file `OWN_QUESTION`, with a warning.

    Raises:
        RewardError: a file that is no text, or has no `{prompt}`.
    """
    fetch, path = fetch_command("unifiedreward"), located(path)
    if not Path(path).is_file():
        warnings.warn(
            f"reward 'unifiedreward': without {path} it asks in words of its own, and its scores cannot be compared "
            f"with published ones. To fetch the official question: {fetch}",
            stacklevel=3,
        )
        return OWN_QUESTION
    try:
        question = Path(path).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"{path} cannot be read: {error}. To fetch it again: {fetch}") from error
    if "{prompt}" not in question:
        raise RewardError(f"{path} has no {{prompt}} where the caption belongs. To fetch it again: {fetch}")
    return question


@dataclass(eq=False)
class UnifiedReward(JudgeServer):
    """`unifiedreward`: caption alignment and image quality, 0.2 to 1; `NOT_APPLICABLE` for an answer without a score.

    `unifiedreward_unparsable` beside it is 1 for such an answer and 0 otherwise, so its mean is their share. With other
    options for server, model and question any vision-language model that ends its answers alike can be the judge; a
    subclass may have a `name` and a `parse` of its own.

    question: the file with what is asked. The other options are those of `JudgeServer`.
    """

    base_url: str = "http://127.0.0.1:17140/v1"
    model: str = "UnifiedReward-7b-v1.5"
    api_key_variable: str = "UNIFIEDREWARD_API_KEY"
    question: str = QUESTION

    @staticmethod
    def dispensable(options: Mapping[str, Any]) -> tuple[str, ...]:
        """Options whose files need not be there: without one it asks in words of its own."""
        return ("question",)

    name: ClassVar[str] = "unifiedreward"
    asks: ClassVar[str] = "question"
    start: ClassVar[str] = START
    must_be_listed: ClassVar[bool] = False
    side: ClassVar[int] = 512

    def __post_init__(self) -> None:
        """Read the question and see that the server is there.

        Raises:
            RewardError: as `JudgeServer`, or a file that is not the question.
        """
        self._question = load_question(self.question)
        super().__post_init__()

    @classmethod
    def problems(cls, **options: Any) -> list[str]:
        """As `JudgeServer.problems`, with a file that is not the question."""
        found, path = super().problems(**options), options.get("question", cls.question)
        try:
            if Path(located(path)).is_file():  # without it, it asks in words of its own
                load_question(path)
        except RewardError as error:
            found.append(str(error))
        return found

    def parse(self, answer: str) -> float | None:
        """The score in [0, 1] that an answer states; None if it states none."""
        value = final_score(answer)
        return None if value is None else value / 5

    def asked(self, prompt: str, metadata: Mapping[str, Any]) -> list[Question]:
        """As `JudgeServer.asked`."""
        return [Question(self._question.replace("{prompt}", prompt), lambda answer: self.parse(answer.text))]

    def row(self, prompt: str, metadata: Mapping[str, Any], values: Sequence[float | None]) -> dict[str, float]:
        """As `JudgeServer.row`."""
        (value,) = values
        score = NOT_APPLICABLE if value is None else value
        return {self.name: score, f"{self.name}_unparsable": float(value is None)}
