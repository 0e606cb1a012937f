"""docs/method.md maps equations to functions, the README names commands: what they name must exist, all of it."""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path
from pkgutil import resolve_name

import pytest

from diffusionopd import losses
from diffusionopd.algorithms import advantages
from diffusionopd.config_schema import load_config
from diffusionopd.config_schema.values import ALGORITHMS

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "method.md").read_text("utf-8")
MODULES = sorted(path.stem for path in (ROOT / "diffusionopd").iterdir() if not path.name.startswith("_"))
FILES = ("json", "jsonl", "py")
NAMES = sorted(
    name
    for name in set(re.findall(rf"`((?:{'|'.join(MODULES)})(?:\.\w+)+)`", TEXT))
    if name.rsplit(".", 1)[1] not in FILES
)


def test_page_names_functions():
    assert len(NAMES) > 20
    assert {name.split(".")[0] for name in NAMES} >= {"transitions", "losses", "rollout", "opd", "learner", "stage1"}


@pytest.mark.parametrize("name", NAMES)
def test_named_function_exists(name):
    assert callable(resolve_name(f"diffusionopd.{name}"))


@cache
def _public_functions() -> list[str]:
    return [
        f"{module.__name__.removeprefix('diffusionopd.')}.{name}"
        for module in (losses, advantages)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    ]


def test_every_formula_is_in_the_table():
    assert len(_public_functions()) > 8
    assert sorted(set(_public_functions()) - set(NAMES)) == []


def test_every_algorithm_is_named():
    assert [name for name in ALGORITHMS if f"`{name}`" not in TEXT] == []


def test_links_within_the_page_lead_to_a_heading():
    titles = re.findall(r"^#+ (.+)$", TEXT, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    wanted = re.findall(r"\]\((?:docs/method\.md)?#([\w-]+)\)", TEXT + (ROOT / "README.md").read_text("utf-8"))
    assert wanted and set(wanted) <= anchors


def test_the_readme_names_the_checkpoint_that_a_tiny_teacher_ends_with():
    text = (ROOT / "README.md").read_text("utf-8")
    (name, checkpoint) = re.search(r"logs/(tiny-teacher-\w+)/checkpoints/checkpoint-(\d+)/lora", text).groups()
    config = load_config(f"{ROOT / 'config' / 'teacher.py'}:{name.replace('-teacher-', '_')}")
    assert (config.run_name, config.num_epochs) == (name, int(checkpoint))
