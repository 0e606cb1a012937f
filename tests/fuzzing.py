"""What the fuzz tests draw: JSON values, altered JSON documents, damaged bytes; and what they may meet: our errors."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
"""Examples of each test, new ones every time; 0: a fixed few, the same in every run."""


def fuzz(examples: int) -> Callable:
    """Settings of a test: `examples` cases, deterministic unless FUZZ_EXAMPLES asks for many random ones."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def only(*errors: type[ValueError], naming: object = "") -> Iterator[None]:
    """Success, or one of these errors, whose message holds `naming` and says something else too."""
    try:
        yield
    except errors as error:
        assert type(error) in errors, f"{type(error).__name__} is not ours"
        assert str(naming) in str(error), f"{error} does not name {naming}"
        assert len(str(error)) > len(str(naming)) + 10


odd_text = st.text(max_size=12) | st.sampled_from(
    [
        "",
        " ",
        "None",
        "nan",
        "\x00",
        "\ud800",
        "\u2028",
        "..",
        "/",
        "a/b",
        "\ufeff",
        "x" * 3000,
        "-1",
        "$(id)",
        "[",
        "(a+",
    ]
)
odd_numbers = st.one_of(
    st.integers(-3, 40),
    st.floats(),
    st.sampled_from([10**400, -(10**400), 2**63, 1e308, -0.0, 0.5, 1e-320]),
)
scalars = st.none() | st.booleans() | odd_numbers | odd_text
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_text, inner, max_size=3), max_leaves=6
)
deep = st.integers(1, 200_000).map(lambda depth: "[" * depth)


def encode(value: Any) -> bytes:
    """The JSON text of a value; halves of surrogate pairs as escapes, NaN as Python writes it."""
    return json.dumps(value).encode()


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON document, from the outside in."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from places(inner)


def altered(document: Any) -> st.SearchStrategy[Any]:
    """The document with one to three places replaced, removed, or joined by another."""

    def apply(changes: list[tuple[int, str, Any]]) -> Any:
        result = copy.deepcopy(document)
        for number, kind, value in changes:
            found = list(places(result))
            if not found:
                return value
            container, key = found[number % len(found)]
            if kind == "remove":
                del container[key]
            elif kind == "add" and isinstance(container, dict):
                container[str(value)[:20]] = value
            else:
                container[key] = value
        return result

    kinds = st.sampled_from(["replace", "replace", "replace", "remove", "add"])
    changes = st.lists(st.tuples(st.integers(0, 1000), kinds, json_values), min_size=1, max_size=3)
    return changes.map(apply) | json_values


def damaged(content: bytes, within: int | None = None) -> st.SearchStrategy[bytes]:
    """The bytes with one to four places overwritten, cut, doubled or cut off; of the first `within` bytes only."""
    length = min(len(content), within or len(content))

    def apply(changes: list[tuple[int, str, bytes]]) -> bytes:
        result = content
        for at, kind, new in changes:
            if kind == "overwrite":
                result = result[:at] + new + result[at + len(new) :]
            elif kind == "insert":
                result = result[:at] + new + result[at:]
            elif kind == "cut":
                result = result[:at] + result[at + len(new) :]
            elif kind == "double":
                result = result[:at] + result[: at + 20] + result[at:]
            else:
                result = result[:at]
        return result

    kinds = st.sampled_from(["overwrite", "overwrite", "overwrite", "insert", "cut", "double", "end"])
    new = st.binary(min_size=1, max_size=8) | st.sampled_from(
        [b"0", b"9", b'"', b"}", b"\xff" * 8, b"\n", b"-", b"\x00"]
    )
    return st.lists(st.tuples(st.integers(0, length), kinds, new), min_size=1, max_size=4).map(apply)


def lines(document: Any) -> st.SearchStrategy[bytes]:
    """Files of JSON lines: whole, altered and damaged ones, other bytes, nested too deeply, with any line ends."""
    line = st.one_of(
        st.just(encode(document)),
        altered(document).map(encode),
        damaged(encode(document)),
        st.binary(max_size=20),
        deep.map(str.encode),
        st.just(b""),
    )
    ends = st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n", b"\xe2\x80\xa8"])
    return st.builds(
        lambda start, body, end, last: start + end.join(body) + last,
        st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"\xff\xfe"]),
        st.lists(line, max_size=4),
        ends,
        st.sampled_from([b"", b"\n"]),
    )
