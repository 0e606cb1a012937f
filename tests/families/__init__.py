"""Small pipelines of the model families beyond the tiny world's, each in its real folder format."""

from . import flux1, qwen_image, qwen_image21, qwen_image_edit, sana, z_image

FAMILIES = (flux1, qwen_image, qwen_image21, qwen_image_edit, sana, z_image)
CASES = {family.CASE.family: family.CASE for family in FAMILIES}
