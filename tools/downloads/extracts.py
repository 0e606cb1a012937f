"""What is kept of a source file when the file itself is not what is needed."""

from __future__ import annotations

import ast
from collections.abc import Callable

from tools.downloads.errors import DownloadError


def question(source: bytes) -> bytes:
    """UnifiedReward's question out of the Python file that asks it, with `{prompt}` where the caption goes.

    It is the one text that is assigned to `question`, holds the caption and asks for a "Final Score:". The file is
    parsed, never run.

    Raises:
        DownloadError: no such text, or several different ones.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise DownloadError(f"the source of the question is not a Python file: {error}") from None
    assigned = (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id == "question" for target in node.targets)
    )
    found = {text for text in map(_template, assigned) if "{prompt}" in text and "Final Score:" in text}
    if len(found) != 1:
        raise DownloadError(f"the source of the question holds {len(found)} texts that may be it, not one")
    return f"{found.pop()}\n".encode()


def _template(node: ast.expr) -> str:
    """A string or f-string with `{name}` where a variable goes; "" for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_template, node.values))
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
        return f"{{{node.value.id}}}"
    return ""


EXTRACTS: dict[str, Callable[[bytes], bytes]] = {"question": question}
