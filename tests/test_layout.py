"""The architecture, read from the source: imports run downward, optional worlds stay apart, every key is used."""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from diffusionopd.config_schema import base_config
from diffusionopd.config_schema.values import NO_EFFECT, SECTIONS, flatten

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "diffusionopd"

# A file imports from its own layer and those above it; inside a layer there are no circles (CONTRIBUTING.md).
LAYERS = {
    "equations": {"transitions", "losses", "rollout"},
    "declarations": {"files", "config_schema"},
    "parts": {"models", "data", "rewards", "distributed", "failures", "launch", "signals", "stages"},
    "methods": {"algorithms", "evaluation"},
    "runs": {"training"},
}
LAYER_OF = {module: layer for layer, modules in enumerate(LAYERS.values()) for module in modules}

# Keys that are only checked: there is nothing else to do with them.
CHECKED_ONLY = {"use_lora"}


def _files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _imports(path: Path) -> set[str]:
    """Dotted names that a file imports, at its top or inside functions; ``from a import b`` counts as ``a.b``."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            found |= {".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names}
    return found


def _own_modules(path: Path) -> set[str]:
    """The modules of the package (first level) that a file imports."""
    parts = [name.split(".") for name in _imports(path)]
    return {name[1] for name in parts if name[0] == PACKAGE and len(name) > 1}


def _module(path: Path) -> str:
    return path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]


LIBRARY = [path for path in _files(PACKAGE) if _module(path) not in ("__init__", "tiny")]


def test_imports_run_downward():
    for path in LIBRARY:
        own = LAYER_OF[_module(path)]  # a new module needs a layer, here and in CONTRIBUTING.md
        assert [name for name in _own_modules(path) if LAYER_OF.get(name, len(LAYERS)) > own] == [], path


def test_modules_have_no_circles():
    imports = {module: set() for module in LAYER_OF}
    for path in LIBRARY:
        imports[_module(path)] |= _own_modules(path) - {_module(path)}
    list(TopologicalSorter(imports).static_order())  # CycleError


def test_the_layers_are_those_of_the_guide():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in text.splitlines() if line.startswith("| ")]
    told = {name: set(re.findall(r"`(\w+)[/.`]", modules)) for name, modules in rows if name in LAYERS}
    assert told == LAYERS


def test_the_tiny_world_is_imported_by_nothing_else():
    outside = [path for path in LIBRARY if "tiny" in _own_modules(path)]
    assert outside == []


def test_torchvision_is_imported_nowhere():
    everywhere = _files(PACKAGE, "config", "scripts", "tests", "benchmarks", "tools", "experiments")
    assert [path for path in everywhere if any(name.split(".")[0] == "torchvision" for name in _imports(path))] == []


def test_configurations_hold_values_only():
    for path in _files("config"):
        assert {name.split(".")[0] for name in _imports(path)} <= {"ml_collections", "pathlib", "runpy"}


def _attributes(path: Path) -> set[str]:
    """Last two parts of every attribute access: ``config.train.cfg`` gives ``train.cfg`` and ``config.train``."""
    found = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
            found.add(f"{owner}.{node.attr}")
    return found


def test_every_key_is_read_somewhere():
    """As ``config.key``, ``config.section.key``, or ``section.key`` after ``section = config.section``."""
    read = set().union(*(_attributes(path) for path in [*LIBRARY, *_files("scripts")]))
    keys = set(flatten(base_config())) - NO_EFFECT - CHECKED_ONLY
    wanted = {key: key if key.split(".")[0] in SECTIONS else f"config.{key}" for key in keys}
    # Teachers, and what they do not say themselves, reach the code through RunPlan.teachers, which the checks build.
    shared = {f"sample.{name}" for name in ("teacher_guidance_scale", "eval_guidance_scale", "eval_num_steps")}
    shared |= {"train.teachers", "dataset", "prompt_fn", "reward_fn"}  # the last three are a single task's
    assert sorted(key for key in keys - shared if wanted[key] not in read) == []
