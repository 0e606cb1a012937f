"""GenEval: are the objects that the prompt asks for in the image, as many, of that colour, in that place?

`scorer.py` is the reward and names colours; `rules.py` reads what a prompt asks for and judges detections against it;
`detector.py` chooses who detects: `mask2former.py` with the official weights that `convert.py` reads, or mmdetection.
"""
