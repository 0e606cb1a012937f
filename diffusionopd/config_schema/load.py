"""Configuration files and command lines: ``FILE:NAME`` and ``--config.key=value``.

A file is a Python file with ``get_config(name)`` or with a function called NAME, returning an ml_collections ConfigDict
(or a dict). What it leaves out comes from ``config/base.py``. Files written for the upstream release work as they are.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import module_from_spec, spec_from_file_location
from inspect import signature
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from diffusionopd.config_schema.keys import SECTIONS, Schema, flatten, to_plain, unset
from diffusionopd.config_schema.problems import ConfigError, nearest
from diffusionopd.files import located, looked_in

_PLACE = re.compile(r"([^\W\d]\w*(\[-?\d+\])*)(\.[^\W\d]\w*(\[-?\d+\])*)*")


def load_config(schema: Schema, source: str, overrides: Sequence[tuple[str, str | None]] = ()) -> ConfigDict:
    """Read ``FILE`` or ``FILE:NAME``, add the schema's defaults, then apply ``(key, text)`` overrides in order.

    A text of None means True. A run without a name gets NAME, or the file's. Keys that do not exist are kept, for
    ``check`` to report. Raises ConfigError for a file, name or override that cannot be found; what the file itself
    raises is passed on.
    """
    file, _, name = source.partition(":")
    config = _with_defaults(schema, _call(Path(located(file)), name))
    if unset(config.get("run_name")) and unset(config.get("save_dir")):
        config.run_name = name or Path(file).stem
    problems = [problem for key, text in overrides if (problem := _override(config, key, text))]
    if problems:
        raise ConfigError(problems)
    return config


def read_json_config(path: Path) -> dict[str, Any]:
    """The configuration in a ``config.json`` as nested dicts, whatever its keys are; ConfigError names the file."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if wrong := flatten(config).keys() & set(SECTIONS):
            raise TypeError(f"{', '.join(wrong)} must be an object")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError([f"{path} is not the config.json of a run: {error}"]) from None
    return config


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[tuple[str, str | None]], list[str]]:
    """Split a command line into the value of ``--config``, the ``--config.key`` overrides, and everything else.

    ``--config X`` and ``--config=X`` are the same, likewise for keys; the last ``--config`` counts. A key without a
    value, at the end or before another option, has None.
    """
    source, overrides, rest = None, [], []
    pending = list(arguments)
    while pending:
        option, has_value, value = pending.pop(0).partition("=")
        if option != "--config" and not option.startswith("--config."):
            rest.append(option + has_value + value)
            continue
        text: str | None = value
        if not has_value:
            text = pending.pop(0) if pending and not pending[0].startswith("--") else None
        if option == "--config":
            if not text:
                raise ConfigError(["--config needs a value. Use for example --config config/opd.py:mopd"])
            source = text
        else:
            overrides.append((option.removeprefix("--config."), text))
    return source, overrides, rest


def _call(file: Path, name: str) -> Any:
    """The configuration called ``name`` in ``file``."""
    if not file.is_file():
        where = looked_in(file)
        raise ConfigError([f"--config: there is no file {file}{where}. Use for example config/opd.py:mopd"])
    if (own := str(file.resolve().parent)) not in sys.path:
        sys.path.append(own)  # rewards and what else a configuration registers may be modules beside it
    with _legacy_imp():
        module = _load_source("diffusionopd_config", str(file))
        names = [key for key, value in vars(module).items() if _is_configuration(module, key, value)]
        choose = f" Use one of {', '.join(f'{file}:{key}' for key in names)}." if names else ""
        what = f"has no {name!r}" if name else "needs a name"
        missing = ConfigError([f"--config: {file} {what}.{nearest(name, names)}{choose}"])
        getter: Any = getattr(module, "get_config", None)
        arguments = [name] if name else []
        if getter is None:
            getter, arguments = vars(module).get(name), []
        try:
            signature(getter).bind(*arguments)
        except TypeError:  # there is none, or it is asked for another number of names
            raise missing from None
        try:
            return getter(*arguments)
        except KeyError as error:
            if error.args == (name,) and name not in names:
                raise missing from error
            raise


def _is_configuration(module: ModuleType, name: str, value: Any) -> bool:
    own = callable(value) and getattr(value, "__module__", None) == module.__name__
    return own and name != "get_config" and not name.startswith("_")


def _load_source(name: str, path: str) -> ModuleType:
    """Run a Python file as a module, without entering it in ``sys.modules``."""
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError([f"--config: {path} is not a Python file."])
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_imp = RLock()


@contextmanager
def _legacy_imp() -> Iterator[None]:
    """Offer ``imp.load_source``, with which upstream files read their base.py; Python 3.12 has no ``imp`` any more."""
    stand_in = ModuleType("imp")
    stand_in.load_source = _load_source  # type: ignore[attr-defined]
    with _imp:  # of all threads, and again for a file that loads another
        before = sys.modules.get("imp")
        sys.modules["imp"] = stand_in
        try:
            yield
        finally:
            del sys.modules["imp"]
            if before is not None:
                sys.modules["imp"] = before


def _with_defaults(schema: Schema, given: ConfigDict | Mapping[str, Any]) -> ConfigDict:
    merged = to_plain(schema.config())
    for key, value in to_plain(given).items():
        if key in SECTIONS and isinstance(value, Mapping):
            merged[key] |= value
        else:
            merged[key] = value
    return ConfigDict(merged, type_safe=False)


def _override(config: ConfigDict, key: str, text: str | None) -> str | None:
    """Set ``key`` (``a.b``, ``a.b[0].c``) to what ``text`` says; the problem if there is no such place."""
    if not _PLACE.fullmatch(key):
        form = "a key is made of names with dots between, [0], [1], ... behind that of a list"
        return f"--config.{key} cannot be set: {form}, such as train.teachers[0].guidance_scale."
    try:
        section, *names = key.split(".")
        if section in ("reward_options", "eval_variants") and names:  # whose names are free: they start empty
            if names[0] not in config[section]:
                config[section][names[0]] = ConfigDict(type_safe=False)
        current = None
        with suppress(KeyError):
            current = config_path.get_value(key, config)
        config_path.set_value(key, config, _parse(text, current), accept_new_attributes=True)
    except (KeyError, AttributeError, IndexError, TypeError, ValueError) as error:
        reasons: dict[type, str] = {
            KeyError: "there is nothing of that name",
            IndexError: "there is no list with that entry",
        }
        reason = reasons.get(type(error), "what is named before has no parts of that kind")
        return f"--config.{key} cannot be set: {reason}.{nearest(key, flatten(config))}"
    return None


def _parse(text: str | None, current: Any) -> Any:
    """The Python value of an override; a key that holds a string takes the text as it is."""
    if text is None:
        return True
    if isinstance(current, str):
        return None if text == "None" else text
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
