"""docs/method.md maps equations to functions, the README names commands: what they name must exist, all of it."""

from __future__ import annotations

import inspect
import re
from pkgutil import resolve_name

from diffusionopd import losses
from diffusionopd.algorithms import ALGORITHMS, advantages
from diffusionopd.training import load_config

from .conftest import ROOT

TEXT = (ROOT / "docs" / "method.md").read_text("utf-8")
MODULES = sorted(path.stem for path in (ROOT / "diffusionopd").iterdir() if not path.name.startswith("_"))
NAMES = sorted(
    name
    for name in set(re.findall(rf"`((?:{'|'.join(MODULES)})(?:\.\w+)+)`", TEXT))
    if name.rsplit(".", 1)[1] not in ("json", "jsonl", "py")
)


def test_what_the_page_names_exists():
    assert len(NAMES) > 20
    assert {name.split(".")[0] for name in NAMES} >= {"transitions", "losses", "rollout", "algorithms"}
    for name in NAMES:
        assert callable(resolve_name(f"diffusionopd.{name}")), name


def test_every_formula_and_algorithm_is_named():
    public = [
        f"{module.__name__.removeprefix('diffusionopd.')}.{name}"
        for module in (losses, advantages)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    ]
    assert len(public) > 8
    assert sorted(set(public) - set(NAMES)) == []
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
