"""The paper's own results: Table 1 of arXiv 2605.15055, as printed. Data only.

SD3.5-Medium at 512x512, evaluated with a 40-step first-order ODE: GenEval and OCR on the splits of Flow-GRPO, the other
scores on DrawBench. UnifiedReward is on its scale of 1 to 5.
"""

SOURCE = "Table 1 of arXiv 2605.15055"

SETTINGS = {"num_inference_steps": 40, "resolution": 512}

_QUALITY = ("drawbench", "pickscore")
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...], int]] = {
    "GenEval": (("geneval_overall", "geneval"), ("geneval",), 3),
    "OCR": (("ocr",), ("ocr",), 3),
    "PickScore": (("pickscore",), _QUALITY, 2),
    "ClipScore": (("clipscore",), _QUALITY, 3),
    "HPSv2.1": (("hpsv2",), _QUALITY, 3),
    "Aesthetic": (("aesthetic",), _QUALITY, 2),
    "ImageReward": (("imagereward",), _QUALITY, 2),
    "UnifiedReward": (("unifiedreward",), _QUALITY, 2),
}
"""Title -> the scores and data sets of which the first that models were evaluated with is shown, and the digits.

`geneval_overall` is GenEval's official figure."""

_TABLE = {
    "SD3.5-M, no CFG": "0.24 0.12 20.51 0.237 0.204 5.13 -0.58 2.02 0.000",
    "SD3.5-M, CFG": "0.63 0.59 22.34 0.285 0.279 5.36 0.85 3.03 0.484",
    "GenEval teacher": "0.96 0.40 22.04 0.274 0.248 5.24 0.59 2.97 0.473",
    "OCR teacher": "0.65 0.93 22.27 0.290 0.272 5.26 0.90 3.09 0.550",
    "Aes teacher": "0.49 0.59 24.02 0.295 0.346 6.22 1.498 3.48 0.698",
    "Multi-task GRPO-Guard": "0.89 0.94 23.12 0.296 0.307 5.61 1.31 3.33 0.763",
    "Multi-task NFT": "0.95 0.96 22.59 0.288 0.282 5.41 1.08 3.23 0.715",
    "Cascade NFT": "0.94 0.91 23.80 0.293 0.331 6.01 1.49 3.49 0.851",
    "DiffusionOPD": "0.96 0.94 23.99 0.297 0.342 6.15 1.50 3.50 0.929",
}
ROWS = {name: row.split()[:-1] for name, row in _TABLE.items()}
"""Model -> its scores in the order of `COLUMNS`, with the digits of the paper."""

AVERAGES = {name: row.split()[-1] for name, row in _TABLE.items()}
"""The paper's "Average" column, described as the mean of min-max normalised scores.

No such mean of these rows gives it: over all rows and columns it is 0.000, 0.566, 0.500, 0.619, 0.857, 0.821, 0.731,
0.934, 0.984, and no choice of columns, no choice of rows to normalise over and no non-negative weighting of the columns
comes closer than 0.009 in every row.
"""
