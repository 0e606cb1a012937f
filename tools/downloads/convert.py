"""What is made of sources that are not the file itself: prompt files in this project's form, and what judges are asked.

Sources are parsed, never run.
"""

from __future__ import annotations

import ast
import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tools.downloads.transfer import DownloadError


def question(sources: Sequence[bytes]) -> bytes:
    """UnifiedReward's question out of the Python file that asks it, with `{prompt}` where the caption goes.

    It is the one f-string that is assigned to `question`, holds the caption and asks for a "Final Score:".

    Raises:
        DownloadError: no such text, or several different ones.
    """
    texts = {
        _template(node.value)
        for node in _nodes(sources)
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "question"
        and isinstance(node.value, ast.JoinedStr)
    }
    found = [text for text in texts if "{prompt}" in text and "Final Score:" in text]
    if len(found) != 1:
        raise DownloadError(f"the source of the question holds {len(found)} texts that may be it, not one")
    return f"{found[0]}\n".encode()


def hpsv3_instruction(sources: Sequence[bytes]) -> bytes:
    """What HPSv3 is told, out of the Python file that says it: its constants `INSTRUCTION` and what follows them."""
    texts = {
        node.targets[0].id: node.value.value
        for node in _nodes(sources)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
    text = texts.get("INSTRUCTION", "") + texts.get("prompt_with_special_token", "")
    if text.count("{text_prompt}") != 1 or text.count("<|Reward|>") != 1:
        raise DownloadError("the source of the question does not hold what HPSv3 is told")
    return text.encode()


def wise_question(sources: Sequence[bytes]) -> bytes:
    """What WISE asks, out of its client: the texts of the two messages, as JSON with `system` and `question`.

    They are the entries `text` of its dictionaries; the one that names prompt and explanation is the question.
    """
    texts = [
        _template(value) if isinstance(value, ast.JoinedStr) else str(value.value)
        for node in _nodes(sources)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "text" and isinstance(value, ast.JoinedStr | ast.Constant)
    ]
    asked = [text for text in texts if "{prompt_data['Prompt']}" in text and "{prompt_data['Explanation']}" in text]
    if len(texts) != 2 or len(asked) != 1:
        raise DownloadError(
            f"the source of the question holds {len(texts)} messages, {len(asked)} of them the question"
        )
    system = next(text for text in texts if text is not asked[0])
    filled = asked[0].replace("{prompt_data['Prompt']}", "{prompt}")
    filled = filled.replace("{prompt_data['Explanation']}", "{Explanation}")
    return (json.dumps({"system": system, "question": filled}, indent=2) + "\n").encode()


def wise_prompts(sources: Sequence[bytes]) -> bytes:
    """WISE's prompts, of one file or several, by their number."""
    records = [record for source in sources for record in _json_list(source)]
    try:
        records = [{"prompt": r["Prompt"], **r} for r in sorted(records, key=lambda record: record["prompt_id"])]
    except (TypeError, LookupError) as error:
        raise DownloadError(f"the source of the prompts is not WISE's: {error!r}") from None
    return _lines({key: value for key, value in record.items() if key != "Prompt"} for record in records)


def dpgbench_prompts(sources: Sequence[bytes]) -> bytes:
    """DPG-Bench's prompts and their questions out of its table, which has a line for each question.

    The official evaluation leaves out the table's first question; here it is among the others.
    """
    items: dict[str, dict[str, Any]] = {}
    try:
        for row in csv.DictReader(io.StringIO(sources[0].decode("utf-8-sig"))):
            item = items.setdefault(row["item_id"], {"prompt": row["text"].strip(), "item_id": row["item_id"]})
            item.setdefault("questions", []).append(
                {
                    "id": int(row["proposition_id"]),
                    "question": row["question_natural_language"],
                    "category": row["tuple"].split("(")[0].strip(),
                    "needs": [int(each) for each in row["dependency"].split(",")],
                }
            )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DownloadError(f"the source of the prompts is not DPG-Bench's table: {error!r}") from None
    return _lines(items.values())


def compbench_complex(sources: Sequence[bytes]) -> bytes:
    """T2I-CompBench's complex prompts, of a list of all, with the kind that two more lists give some of them."""
    lists = [source.decode("utf-8-sig").splitlines() for source in sources]
    if len(lists) != 3 or not all(lists) or "<" in lists[0][0]:
        raise DownloadError("the source of the prompts is not T2I-CompBench's three lists")
    every, in_space, of_action = ([line for line in each if line.strip()] for each in lists)
    key = lambda line: line.split(".")[0].lower()  # noqa: E731  (as they are compared officially)
    kinds = dict.fromkeys(map(key, of_action), "action") | dict.fromkeys(map(key, in_space), "spatial")
    return _lines({"prompt": line.strip(), "kind": kinds.get(key(line), "both")} for line in every)


def _nodes(sources: Sequence[bytes]) -> list[ast.AST]:
    try:
        return list(ast.walk(ast.parse(sources[0])))
    except (SyntaxError, ValueError) as error:
        raise DownloadError(f"the source of the question is not a Python file: {error}") from None


def _template(text: ast.JoinedStr) -> str:
    """An f-string with `{name}` where a variable goes."""
    parts = (ast.literal_eval(p) if isinstance(p, ast.Constant) else f"{{{ast.unparse(p.value)}}}" for p in text.values)  # type: ignore[attr-defined]
    return "".join(parts)


def _json_list(source: bytes) -> list[dict[str, Any]]:
    try:
        content = json.loads(source)
    except ValueError as error:
        raise DownloadError(f"the source of the prompts is no JSON: {error}") from None
    if not isinstance(content, list) or not all(isinstance(each, dict) for each in content):
        raise DownloadError("the source of the prompts is no list of records")
    return content


def _lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


CONVERSIONS: dict[str, Callable[[Sequence[bytes]], bytes]] = {
    "unifiedreward_question": question,
    "hpsv3_instruction": hpsv3_instruction,
    "wise_question": wise_question,
    "wise_prompts": wise_prompts,
    "compbench_complex": compbench_complex,
    "dpgbench_prompts": dpgbench_prompts,
}
"""`convert` of the catalogue -> from the sources to the file's content."""
