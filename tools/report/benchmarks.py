"""How scores of benchmarks that the paper does not have are shown: titles, digits and scales. Data only."""

TITLES: dict[str, tuple[str, int]] = {
    "geneval2": ("GenEval 2", 1),
    "dpgbench": ("DPG-Bench", 2),
    "wise": ("WISE", 3),
    "wise_verified": ("WISE Verified", 3),
    "hpsv3": ("HPSv3", 2),
    "judge": ("Judge", 3),
    "compbench_attribute": ("CompBench attribute", 4),
    "compbench_spatial": ("CompBench spatial", 4),
    "compbench_nonspatial": ("CompBench non-spatial", 4),
    "compbench_complex": ("CompBench complex", 4),
}
"""Score -> the title of its column, and digits. Others are called by their names, with three digits."""

PLACES = {f"compbench_{kind}": f"CompBench {kind}" for kind in ("color", "shape", "texture")}
"""Test set -> the title of `compbench_attribute` on it."""

PERCENT = ("geneval2", "dpgbench")
"""Rewards whose shares are quoted times 100."""
_NO_SHARES = ("_questions", "_unseen", "_unparsable")
_NO_QUALITY = (*_NO_SHARES, "hpsv3_sigma")


def title_of(score: str, data_set: str) -> tuple[str, int]:
    """Title and digits of a column."""
    title, digits = TITLES.get(score, (score, 3))
    return (PLACES.get(data_set, title) if score == "compbench_attribute" else title), digits


def is_percent(score: str) -> bool:
    """Whether a score is shown times 100."""
    return score.startswith(PERCENT) and not score.endswith(_NO_SHARES)


def is_quality(score: str) -> bool:
    """Whether more is better: not so of counts of questions and answers, and of a scorer's own doubt."""
    return not score.endswith(_NO_QUALITY)
