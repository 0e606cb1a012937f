"""An evaluation of the tiny world with a judge, killed in its midst and resumed."""

import json
import os
import subprocess
import sys

import pytest

from diffusionopd.evaluation.results import AVERAGES, RESULTS, SETTINGS

from .chat import ChatServer, chat, sent_image, sent_text, serving
from .conftest import ROOT

QUESTIONS = """
questions:
  - {name: shown, ask: "Does this show {prompt}? Answer yes or no.", answer: "yes", probability: true}
  - {name: good, ask: "Rate it from 1 to 5.", number: 'Score: (\\d)', range: [1, 5], weight: 0.5}
"""


def answer(number, body):
    """A function of what is asked alone."""
    level = sum(sent_image(body).resize((1, 1)).getpixel((0, 0)))
    if sent_text(body).startswith("Does"):
        p = 0.1 + (level + len(sent_text(body))) % 8 / 10
        return chat("Yes", {"Yes": p, "No": 1 - p})
    return chat(f"Score: {1 + level % 5}")


@pytest.mark.slow
def test_a_judged_evaluation_that_is_killed_goes_on_where_it_was(tmp_path):
    (tmp_path / "own.yaml").write_text(QUESTIONS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    def start(output, *more):
        flags = ["--base", "--config", "config/tiny.py:mopd", "--dataset", "compose", "scene", "--limit", "6"]
        flags += ["--batch_size", "2", "--rewards", "judge", "jpeg_compressibility", "--output_dir", tmp_path / output]
        flags += ["--cache_dir", tmp_path / "cache", *more, "--reward_options", f"judge.base_url={server.address}"]
        flags += ["judge.model=m", f"judge.questions={tmp_path / 'own.yaml'}"]
        arguments = [sys.executable, "scripts/evaluate.py", *map(str, flags)]
        return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=-1, stderr=-2, text=True)

    with serving(ChatServer()) as server:
        server.answer = answer
        whole = start("whole")
        assert whole.wait(300) == 0, whole.stdout.read()
        assert len(server.requests) == 2 * 2 * 6

        def kill(number, body):
            if number == 24 + 16:  # of 24: in the second data set
                run.kill()
            return answer(number, body)

        server.answer = kill
        run = start("cut")
        assert run.wait(300) == -9
        assert not (tmp_path / "cut" / "scene" / AVERAGES).exists()
        again = start("cut", "--resume")
        assert again.wait(300) == 0, again.stdout.read()
        assert len(server.requests) <= 24 + 24 + 4, "no more than the batch that was lost is judged twice"
        for name in ("compose", "scene"):
            for file in (AVERAGES, RESULTS, SETTINGS):
                wanted, found = (tmp_path / folder / name / file for folder in ("whole", "cut"))
                assert found.read_bytes() == wanted.read_bytes()
        scores = json.loads((tmp_path / "cut" / "scene" / AVERAGES).read_text())
        assert scores["counts"]["judge"] == 6 and 0 < scores["judge"] < 1
        (tmp_path / "own.yaml").write_text(QUESTIONS.replace("0.5", "0.6"))
        other = start("cut", "--resume")
        assert other.wait(300) == 1 and "reward_files" in other.stdout.read(), "other questions are another evaluation"
