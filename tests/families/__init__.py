"""Small pipelines of the model families, each in its real folder format."""

from . import flux1, flux2, qwen_image, qwen_image21, qwen_image_edit, sana, sd3, z_image

_MODULES = (sd3, flux1, flux2, qwen_image, qwen_image21, qwen_image_edit, sana, z_image)
CASES = {module.CASE.family: module.CASE for module in _MODULES}
