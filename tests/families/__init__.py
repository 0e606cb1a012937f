"""Small pipelines of the model families beyond the tiny world's, each in its real folder format."""

from . import flux1, qwen_image, sana, z_image

CASES = {case.family: case for case in (flux1.CASE, qwen_image.CASE, sana.CASE, z_image.CASE)}
