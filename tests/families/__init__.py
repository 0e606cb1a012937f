"""Small pipelines of the model families beyond the tiny world's, each in its real folder format."""

from . import flux1, flux2, qwen_image, sana, z_image

CASES = {case.family: case for case in (flux1.CASE, flux2.CASE, qwen_image.CASE, sana.CASE, z_image.CASE)}
