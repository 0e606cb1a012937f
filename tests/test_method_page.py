"""What the documentation names must exist: functions of docs/method.md, the README's checkpoint, every link."""

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


def test_links_lead_to_a_file_and_a_heading():
    folders = "docs dataset reward_ckpts benchmarks assets experiments scripts tools tests".split()
    pages = [*ROOT.glob("*.md"), *(page for folder in folders for page in (ROOT / folder).rglob("*.md"))]
    texts = {page.resolve(): re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S) for page in pages}
    assert len(texts) > 20
    for page, text in texts.items():
        for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), (page, link)
            titles = re.findall(r"^#+ (.+)$", texts.get(target, ""), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not anchor or anchor in anchors, (page, link)


def test_the_readme_names_the_checkpoint_that_a_tiny_teacher_ends_with():
    text = (ROOT / "README.md").read_text("utf-8")
    (name, checkpoint) = re.search(r"logs/(tiny-teacher-\w+)/checkpoints/checkpoint-(\d+)/lora", text).groups()
    config = load_config(f"{ROOT / 'config' / 'teacher.py'}:{name.replace('-teacher-', '_')}")
    assert (config.run_name, config.num_epochs) == (name, int(checkpoint))
