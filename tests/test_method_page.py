"""docs/method.md maps equations to functions: the functions it names must exist."""

import importlib
import re
from functools import reduce
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "method.md"
NAMES = sorted(set(re.findall(r"`((?:transitions|losses|rollout|opd|optim)\.\w+(?:\.\w+)*)`", PAGE.read_text("utf-8"))))


def test_page_names_functions():
    assert len(NAMES) > 10


@pytest.mark.parametrize("name", NAMES)
def test_named_function_exists(name):
    module, *attributes = name.split(".")
    assert callable(reduce(getattr, attributes, importlib.import_module(f"diffusionopd.{module}")))
