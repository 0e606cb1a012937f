"""The defaults of every configuration key; ``docs/configuration.md`` has them with what they do.

Each key is declared beside the code that reads it (``diffusionopd/training/keys.py`` assembles them). The other files
here start from these defaults and set what differs. Any key can be set on the command line too:
``--config config/opd.py:mopd --config.seed=7 '--config.train.teachers[0].guidance_scale=1.0'`` (quoted, for zsh).
"""

from ml_collections import ConfigDict

from diffusionopd.training import base_config


def get_config() -> ConfigDict:
    """Return a fresh copy of the defaults. Not runnable by itself: it names no model and no teachers."""
    return base_config()
