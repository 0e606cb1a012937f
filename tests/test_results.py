"""Result files: resuming, merging, averages."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusionopd.data.prompts import Prompt
from diffusionopd.evaluation.results import (
    AVERAGES,
    RESULTS,
    SETTINGS,
    EvaluationError,
    Record,
    ResultFolder,
    Summary,
    averages_json,
    format_table,
    read_averages,
    read_records,
    summarise,
)
from diffusionopd.files import FolderError
from diffusionopd.rewards import Weighted

from .helpers import files_of, no_file_longer_than

TEXTS = [f"prompt {i}" for i in range(6)]
METADATA = {"tag": "x"}


PIXELS = np.zeros((8, 8, 3), np.uint8)


def record(sample_id: int, score: float = 1.0) -> Record:
    return Record(sample_id, TEXTS[sample_id], METADATA, {"a": score})


def ids(path: Path) -> list[int]:
    return [r.sample_id for r in read_records(path)]


def opened(folder: Path, resume=False, settings=None, texts=TEXTS, images=False, overwrite=False, **share):
    files = ResultFolder(folder, **share)
    prompts = [text if isinstance(text, Prompt) else Prompt(text, METADATA) for text in texts]
    files.open(settings or {"seed": 1}, prompts, resume=resume, need_images=images, overwrite=overwrite)
    return files


def finished(folder: Path, samples: int = 6) -> None:
    """An evaluation with images that has come to its end."""
    files = opened(folder, texts=TEXTS[:samples], images=True)
    for i in range(samples):
        files.save_image(i, PIXELS)
        files.append([record(i)])
    files.close()


def error_of(*values: float) -> float:
    return np.std(values, ddof=1) / math.sqrt(len(values))


def test_mean_and_standard_error_leave_out_what_does_not_apply():
    found = summarise([record(0, 1.0), record(1, 2.0), record(2, -10.0), record(3, 6.0)])
    assert found == {"a": Summary(3.0, pytest.approx(error_of(1, 2, 6)), 3, 3)}
    assert summarise([record(0, -10.0)]) == {}


def test_standard_error_counts_prompts_not_images():
    """Images of one text count once, whether made for one line of the test set or for several."""
    records = [Record(i, "pq"[i % 2], {}, {"a": value}) for i, value in enumerate([0.0, 1.0, 0.0, 1.0])]
    assert summarise(records) == {"a": Summary(0.5, pytest.approx(error_of(0, 1)), 4, 2)}
    assert summarise(records[:1])["a"].standard_error == 0.0
    beside = [replace(r, prompt="p", metadata={"reference_image": f"{r.sample_id % 2}.png"}) for r in records]
    for images in (beside, [replace(r, reference=r.metadata["reference_image"]) for r in beside]):
        assert summarise(images) == summarise(records), "one text beside two images is two prompts"
        weighted = {"b": Weighted("a", "a")}
        assert summarise(images, weighted) == summarise(records, weighted)


def test_the_error_is_that_of_the_printed_mean_where_prompts_come_unequally_often():
    """As the spread of what resampled prompts would give."""
    rng = np.random.default_rng(1)
    counts, means = rng.choice([2, 4, 12, 18], 300), rng.uniform(0, 1, 300)
    values = [rng.normal(mean, 0.1, count) for mean, count in zip(means, counts, strict=True)]
    rows = [(f"p{i}", value) for i, own in enumerate(values) for value in own]
    found = summarise([Record(i, prompt, {}, {"a": value}) for i, (prompt, value) in enumerate(rows)])["a"]
    sums, drawn = np.array([own.sum() for own in values]), rng.integers(0, 300, (4000, 300))
    assert math.isclose(found.mean, sums.sum() / counts.sum())
    spread = np.std(sums[drawn].sum(1) / counts[drawn].sum(1))
    assert math.isclose(found.standard_error, spread, rel_tol=0.06)
    assert spread > 1.1 * error_of(*(own.mean() for own in values)), "that of a mean of prompts is another one"


def test_averages_keep_upstreams_form(tmp_path):
    content = averages_json(summarise([record(0, 1.0), record(1, 2.0)]))
    assert content["a"] == 1.5
    assert content["counts"] == {"a": 2} and content["standard_errors"]["a"] == 0.5
    (tmp_path / AVERAGES).write_text(json.dumps({"a": 1.5}))  # as upstream writes it
    assert read_averages(tmp_path / AVERAGES)["a"].mean == 1.5
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_averages(tmp_path / "nothing.json")


def test_lines_are_on_disk_at_once_one_cut_short_is_dropped_and_one_in_the_middle_is_an_error(tmp_path):
    files, path = opened(tmp_path), tmp_path / RESULTS
    files.append([record(0)])
    line = {"sample_id": 0, "prompt": "prompt 0", "metadata": {"tag": "x"}, "scores": {"a": 1.0}}
    assert json.loads(path.read_text()) == line
    files.append([record(1)])
    path.write_bytes(path.read_bytes()[:-20])
    assert ids(path) == [0]
    resumed = opened(tmp_path, resume=True)
    assert resumed.done() == {0}
    resumed.append([record(1)])
    assert ids(path) == [0, 1]
    path.write_bytes(b'{"broken\n' + path.read_bytes())
    with pytest.raises(EvaluationError, match="line 1: not a result"):
        read_records(path)


def test_parts_of_several_processes_are_merged_and_sorted_and_survive_another_number_of_processes(tmp_path):
    opened(tmp_path, world=2).append([record(0), record(2)])
    ResultFolder(tmp_path, rank=1, world=2).append([record(1), record(3)])
    again = opened(tmp_path, resume=True, world=3)
    assert again.done() == {0, 1, 2, 3}
    again.append([record(5)])
    ResultFolder(tmp_path, rank=2, world=3).append([record(4)])
    again.close()
    assert ids(tmp_path / RESULTS) == [0, 1, 2, 3, 4, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([AVERAGES, RESULTS, SETTINGS])


def test_no_evaluation_is_made_again_or_replaced_unasked(tmp_path):
    """Of pictures only its own go: those of its samples."""
    finished(tmp_path)
    for name in ("holiday.jpg", "00006.jpg"):
        (tmp_path / "images" / name).write_bytes(b"mine")
    before = files_of(tmp_path)
    for resume in (False, True):
        for other in ({"settings": {"seed": 2}}, {"texts": TEXTS[:3]}, {"texts": TEXTS[::-1]}, *[{}] * (not resume)):
            with pytest.raises(EvaluationError) as refused:
                opened(tmp_path, resume, **other)
            assert str(tmp_path) in str(refused.value) and files_of(tmp_path) == before
    with pytest.raises(EvaluationError, match="00006.jpg"):  # which it would write
        opened(tmp_path, texts=[*TEXTS, "one more"], images=True)
    again = opened(tmp_path, overwrite=True)
    assert again.done() == set()
    assert sorted(path.name for path in tmp_path.iterdir()) == [SETTINGS, "images"]
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["00006.jpg", "holiday.jpg"]
    again.append([record(0)])
    for resume in (False, True):
        opened(tmp_path, resume, settings={"seed": 2}, overwrite=True)
        assert again.done() == set() and json.loads((tmp_path / SETTINGS).read_text())["seed"] == 2


def test_a_damaged_evaluation_is_kept_until_it_is_to_be_replaced(tmp_path):
    finished(tmp_path)
    (tmp_path / RESULTS).write_bytes(b"{}\n")
    for resume in (False, True):
        with pytest.raises(EvaluationError, match="line 1"):
            opened(tmp_path, resume)
    assert opened(tmp_path, resume=True, overwrite=True).done() == set()
    assert not list(tmp_path.glob("images/*"))


@pytest.mark.parametrize("images_saved", [0, 6])
def test_pictures_are_the_evaluations_own_if_it_has_saved_some(images_saved, tmp_path):
    finished(tmp_path, 3)
    (tmp_path / SETTINGS).write_text(json.dumps({"seed": 1, "images_saved": images_saved}))
    if images_saved == 0:
        with pytest.raises(EvaluationError, match="00000.jpg"):
            opened(tmp_path, images=True)
    opened(tmp_path, overwrite=True)
    assert len(list(tmp_path.glob("images/*"))) == (3 if images_saved == 0 else 0)


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", AVERAGES, RESULTS, "evaluation_results.part1.jsonl", "images/00000.jpg"]
)
def test_a_folder_with_files_of_others_is_refused_and_stays_as_it_was(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}\n")
    before = files_of(tmp_path)
    for how in ({}, {"resume": True}, {"overwrite": True}, {"images": True}):
        with pytest.raises(EvaluationError) as refused:
            opened(tmp_path, **how)
        assert str(tmp_path) in str(refused.value) and name.split("/")[0] in str(refused.value)
        assert files_of(tmp_path) == before


def test_a_kill_while_a_folder_is_made_ready_leaves_nothing_mixed_or_lost(tmp_path, monkeypatch):
    """Before each change of a file: what is scored there belongs to the settings there, and a resume keeps it all."""

    def dying(function, calls):
        def call(*args, **kwargs):
            if next(calls) == 0:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    for same in (False, True):
        for moment in itertools.count():
            folder, calls = tmp_path / f"{same}-{moment}", itertools.count(-moment)
            finished(folder, 3)
            ResultFolder(folder, rank=1, world=2).append([record(5)])
            with monkeypatch.context() as patch:
                for owner, name in ((Path, "unlink"), (ResultFolder, "_write")):
                    patch.setattr(owner, name, dying(getattr(owner, name), calls))
                try:
                    opened(folder, resume=same, settings={"seed": 1 if same else 2}, overwrite=True)
                    break
                except KeyboardInterrupt:
                    pass
            seed = json.loads((folder / SETTINGS).read_text())["seed"]
            left = opened(folder, resume=True, settings={"seed": seed}).done()
            assert left == {0, 1, 2, 5} if same else seed == 1 or not left
        assert moment > 4


def test_a_sample_without_its_picture_is_made_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    tmp_path = Path(tmp_path.name)  # as on a command line, relative
    files = opened(tmp_path, images=True)
    files.append([record(0), record(1)])
    files.save_image(1, np.full((8, 8, 3), 200, np.uint8))
    assert np.asarray(Image.open(tmp_path / "images" / "00001.jpg")).shape == (8, 8, 3)
    assert opened(tmp_path, resume=True, images=True).done() == {1}


def test_a_resume_that_would_mix_two_evaluations_is_refused(tmp_path):
    opened(tmp_path).append([record(0), record(3)])
    with pytest.raises(EvaluationError, match="seed was 1, is 2"):
        opened(tmp_path, resume=True, settings={"seed": 2})
    with pytest.raises(EvaluationError, match="sample 3 .* the 2 wanted now"):
        opened(tmp_path, resume=True, texts=TEXTS[:2])
    with pytest.raises(EvaluationError, match="sample 3 has another prompt"):
        opened(tmp_path, resume=True, texts=[*TEXTS[:3], "another", *TEXTS[4:]])
    with pytest.raises(EvaluationError, match="sample 3 has other metadata"):
        opened(tmp_path, resume=True, texts=[*TEXTS[:3], Prompt(TEXTS[3], {"tag": "y"}), *TEXTS[4:]])
    assert opened(tmp_path, resume=True).done() == {0, 3}
    (tmp_path / SETTINGS).write_text("[1")
    with pytest.raises(EvaluationError, match=SETTINGS):
        opened(tmp_path, resume=True, overwrite=True)


def test_table_is_aligned():
    table = format_table({"ocr": summarise([record(0, 1.0), record(1, 2.0)])}).splitlines()
    assert table[0].split() == ["dataset", "score", "mean", "s.e.", "n", "prompts"]
    assert table[1].split() == ["ocr", "a", "1.5000", "0.5000", "2", "2"]
    assert len({len(line) for line in table}) == 1 and table[0].index("score") == table[1].index("a ")


def test_a_weighted_figure_is_the_share_of_all_questions_with_the_error_of_a_ratio():
    """As the spread of what resampled prompts would give."""
    rng = np.random.default_rng(0)
    asked = rng.integers(1, 9, 400)
    right = rng.binomial(asked, rng.uniform(0.3, 0.9, 400))
    scores = [{"a": r / n, "n": float(n)} for r, n in zip(right, asked, strict=True)]
    records = [Record(i, f"p{i}", {}, each) for i, each in enumerate([*scores, {"a": -10.0, "n": -10.0}])]
    found = summarise(records, {"a": Weighted("a", "n"), "lost": Weighted("b", "n")})
    assert math.isclose(found["a"].mean, right.sum() / asked.sum()) and "lost" not in found
    assert (found["a"].count, found["a"].prompts) == (400, 400)
    drawn = rng.integers(0, 400, (2000, 400))
    spread = np.std(right[drawn].sum(axis=1) / asked[drawn].sum(axis=1))
    assert math.isclose(found["a"].standard_error, spread, rel_tol=0.06)
    twice = [Record(i, f"p{i % 400}", {}, r.scores) for i, r in enumerate([*records[:400], *records[:400]])]
    again = summarise(twice, {"a": Weighted("a", "n")})["a"]
    assert math.isclose(again.standard_error, found["a"].standard_error) and again.prompts == 400, (
        "images of one prompt count once"
    )


def test_a_combined_figure_is_the_plain_mean_of_means():
    values = ((1.0, -10.0), (0.0, -10.0), (1.0, -10.0), (-10.0, 0.0))
    records = [Record(i, "abcd"[i], {}, dict(zip(("one", "two"), each, strict=True))) for i, each in enumerate(values)]
    found = summarise(records, combined={"overall": ("one", "two")})["overall"]
    assert found == Summary(pytest.approx((2 / 3 + 0) / 2), pytest.approx(error_of(1, 0, 1) / 2), 4, 4)
    assert "overall" not in summarise(records[:3], combined={"overall": ("one", "two")})  # nothing is known of "two"


def test_a_full_disk_is_explained_and_what_was_scored_is_kept(tmp_path):
    files, noise = opened(tmp_path), np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    files.append([record(0)])
    with no_file_longer_than((tmp_path / RESULTS).stat().st_size + 5):
        for name, write in (
            (f"{RESULTS} cannot be written.*File too large", lambda: files.append([record(1)])),
            ("00001.jpg cannot be written", lambda: files.save_image(1, noise)),
            (f"{AVERAGES} cannot be written", files.close),
        ):
            with pytest.raises(FolderError, match=f"{name}.*--resume"):
                write()
    assert sorted(path.suffix for path in tmp_path.rglob("*") if path.is_file()) == [".json", ".jsonl"]
    assert opened(tmp_path, resume=True).done() == {0}
