"""Small pipelines of the model families beyond the tiny world's, each in its real folder format."""

from . import flux1, sana

CASES = {case.family: case for case in (flux1.CASE, sana.CASE)}
