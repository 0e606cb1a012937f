"""The machinery of configurations: declaring keys, reading files and command lines, collecting what is wrong.

The keys themselves are declared beside the code that reads them; ``diffusionopd.training.keys`` assembles them.
"""

from diffusionopd.config_schema.keys import (
    FREE,
    READ,
    REFUSE,
    REWARDS,
    ROUND,
    SECTIONS,
    TEACHERS,
    WRITE,
    Key,
    Schema,
    comparable,
    flatten,
    is_device,
    is_number,
    key,
    keys_of,
    placed,
    read,
    to_plain,
    unset,
    unwritable,
)
from diffusionopd.config_schema.load import load_config, read_json_config, split_arguments
from diffusionopd.config_schema.problems import ConfigError, Problems, nearest
from diffusionopd.config_schema.secrets import check_no_secrets, find_secrets, redacted

__all__ = [
    "FREE", "READ", "REFUSE", "REWARDS", "ROUND", "SECTIONS", "TEACHERS", "WRITE", "ConfigError", "Key", "Problems",
    "Schema", "check_no_secrets", "comparable", "find_secrets", "flatten", "is_device", "is_number", "key", "keys_of",
    "load_config", "nearest", "placed", "read", "read_json_config", "redacted", "split_arguments", "to_plain", "unset",
    "unwritable",
]  # fmt: skip
