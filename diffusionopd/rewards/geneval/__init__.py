"""GenEval: are the objects that the prompt asks for in the picture, as many, of that colour, in that place?

`scorer.py` is the reward; `request.py` reads what a prompt asks for, `rules.py` judges detections against it,
`detector.py` chooses who detects: `mask2former.py`, with the official weights that `convert.py` reads, or
`mmdet_model.py`. `colours.py` names colours.
"""

from diffusionopd.rewards.geneval.scorer import GenEval

__all__ = ["GenEval"]
