"""The architecture, read from the source: imports run downward, optional worlds stay apart, every key is read."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from diffusionopd.config_schema import keys_of
from diffusionopd.training.keys import SCHEMA

from .conftest import ROOT

PACKAGE = "diffusionopd"

# A file imports from its own layer and those above it; inside a layer there are no circles (docs/design.md).
LAYERS = {
    "equations": {"rows", "transitions", "losses", "rollout"},
    "declarations": {"files", "config_schema"},
    "parts": {"models", "data", "rewards", "distributed", "failures", "launch", "locks", "signals", "stages"},
    "methods": {"algorithms", "evaluation"},
    "runs": {"training", "__main__"},
}
LAYER_OF = {module: layer for layer, modules in enumerate(LAYERS.values()) for module in modules}


def _files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def _imports(path: Path) -> frozenset[str]:
    """Dotted names that a file imports, at its top or inside functions; ``from a import b`` counts as ``a.b``."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            found |= {".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names}
    return frozenset(found)


def _own_modules(path: Path) -> set[str]:
    """The modules of the package (first level) that a file imports."""
    parts = [name.split(".") for name in _imports(path)]
    return {name[1] for name in parts if name[0] == PACKAGE and len(name) > 1}


def _module(path: Path) -> str:
    return path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]


LIBRARY = [path for path in _files(PACKAGE) if _module(path) not in ("__init__", "tiny")]
OUTSIDE = ("tools", "experiments", "benchmarks", "scripts", "config", "tests")


def test_imports_run_downward_without_circles_and_leave_the_outside_alone():
    """Between modules (first level) and between files; a new module needs a layer, here and in CONTRIBUTING.md."""
    modules: dict[str, set[str]] = {module: set() for module in LAYER_OF}
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in LIBRARY}
    files: dict[str, set[str]] = {name: set() for name in names}
    for name, path in names.items():
        own, imported = _module(path), _own_modules(path)
        assert [other for other in imported if LAYER_OF.get(other, len(LAYERS)) > LAYER_OF[own]] == [], path
        assert [other for other in _imports(path) if other.split(".")[0] in OUTSIDE] == [], path
        modules[own] |= imported - {own}
        # A module, or a name in one; a package's __init__ may import its own files, and they each other.
        files[name] |= {o if o in names else o.rpartition(".")[0] for o in _imports(path)} & names.keys() - {name}
    list(TopologicalSorter(modules).static_order())  # CycleError
    list(TopologicalSorter(files).static_order())


def test_the_layers_are_those_of_the_guide():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in text.splitlines() if line.startswith("| ")]
    layer, told = "", defaultdict(set)
    for name, modules in rows:  # an empty name: the layer of the row above
        layer = name or layer
        told[layer] |= set(re.findall(r"`(\w+)[/.`]", modules))
    assert {layer: told[layer] for layer in LAYERS} == LAYERS


def test_optional_worlds_stay_apart():
    everywhere = _files(PACKAGE, *OUTSIDE)
    assert [path for path in everywhere if any(name.split(".")[0] == "torchvision" for name in _imports(path))] == []
    allowed = {"ml_collections", "pathlib", "runpy"}
    for path in _files("config"):
        other = {name for name in _imports(path) if name.split(".")[0] not in allowed}
        assert {name.rpartition(".")[0] for name in other} <= {"diffusionopd.training"}, path


def test_every_key_is_read_somewhere():
    """As a field of its group, which some file asks for as ``settings.field``, or by its full name."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in [*LIBRARY, *_files("scripts")])
    fields = {key.name: field for key in SCHEMA.keys.values() for field in keys_of(key.group) if
              keys_of(key.group)[field].name == key.name}  # fmt: skip
    unread = [
        name
        for name, key in SCHEMA.keys.items()
        if key.used and not re.search(rf"\.{fields[name]}\b", text) and text.count(f'"{name}"') < 2
    ]
    assert unread == ["use_lora"], "which is only checked"
