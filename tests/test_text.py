"""The text cache: exact round trips, nothing encoded twice, damage found, several writers, a disk that is full."""

import os
import shutil
import struct
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from diffusionopd.files import FolderError
from diffusionopd.models.conditions import NEGATIVE, Conditions
from diffusionopd.models.loading import load_text_encoder
from diffusionopd.models.text_cache import TextCache, TextCacheError

from .forked import fork

PROMPTS = ["a red cube", "", "日本語 'quoted'\n", "a blue ball", NEGATIVE]


@pytest.fixture(autouse=True)
def _quick_collection(monkeypatch):
    """`fill` collects garbage once a run; in a test process full of libraries each takes a quarter second."""
    monkeypatch.setattr("diffusionopd.models.text_cache.gc.collect", lambda: 0)


class Encoder:
    """A deterministic stand-in; remembers its batches."""

    def __init__(self):
        self.batches = []

    def __call__(self, prompts):
        self.batches.append(list(prompts))
        return encoded(prompts)


def encoded(prompts):
    """A row per prompt: as many tokens as it has words, a vector, and an integer that no dtype changes."""
    rows = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(sum(prompt.encode()) + len(prompt))
        tokens = torch.randn(1 + len(prompt.split()), 6, generator=generator)
        rows.append({"tokens": tokens, "pooled": torch.randn(3, generator=generator), "kind": torch.tensor([7])})
    return rows


def assert_same(mine, other):
    assert mine.parts.keys() == other.parts.keys()
    assert mine.lengths == other.lengths
    assert all(mine[name].dtype == other[name].dtype and torch.equal(mine[name], other[name]) for name in mine.parts)


def cache(folder, model="model@1", length=128, dtype=torch.float32, **options):
    return TextCache(folder, model, length, dtype, **options)


def forbidden():
    raise AssertionError("the encoder must not be loaded")


def files(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def test_prompts_that_are_cut_are_said_once(tmp_path, pipeline_folder, capfd):
    """How much, by the tokenizers themselves; and diffusers' own words, which have the padding, are not heard."""
    texts = ["a red circle", NEGATIVE, *(f"{n} " + "red circle " * 20 for n in range(5))]
    with pytest.warns(UserWarning) as said:
        load = partial(load_text_encoder, str(pipeline_folder), max_sequence_length=9)
        cache(tmp_path, length=9).fill(texts, load, 2)
    (message,) = {str(warning.message) for warning in said}
    assert message.startswith("5 ") and "2 more" in message and "'0 red" in message and "'a red" not in message
    for name, limit in (("tokenizer", 14), ("tokenizer_3", 9)):
        length = len(AutoTokenizer.from_pretrained(pipeline_folder / name)(texts[2]).input_ids)
        assert f"{length - limit} of {length} " in message
    printed = "".join(capfd.readouterr())
    assert "truncated" not in printed and "Token indices" not in printed


# --- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_comes_back_is_what_was_encoded(tmp_path, dtype):
    """In another order, more than once, converted; of files whose folders are named by the start of their hash."""
    assert cache(tmp_path, dtype=dtype).fill(PROMPTS, Encoder, batch_size=3) == len(PROMPTS)
    got = (store := cache(tmp_path, dtype=dtype)).get(PROMPTS[::-1])
    assert got["tokens"].dtype == got["pooled"].dtype == dtype
    expected = Conditions.of(encoded(PROMPTS[::-1])).to(dtype=dtype)
    assert_same(got, expected)
    got["tokens"].zero_()
    assert_same(store.get(PROMPTS[::-1]), expected)  # no alias of what the cache holds
    got = store.get([NEGATIVE] * 3, "cpu", torch.float64)
    assert got["pooled"].shape == (3, 3) and got["tokens"].dtype == torch.float64
    assert torch.equal(got["tokens"][0], got["tokens"][2])
    for path in files(tmp_path):
        assert path.suffix == ".safetensors" and path.name.startswith(path.parent.name) and len(path.parent.name) == 2
    assert len(files(tmp_path)) == len(PROMPTS)  # the negative prompt and the empty one are two


def test_only_what_is_missing_is_encoded_once_each(tmp_path):
    cache(tmp_path).fill(PROMPTS[:2], Encoder)
    encoder, prompts = Encoder(), [*PROMPTS, *PROMPTS, "new"]
    assert cache(tmp_path).missing(prompts) == [*PROMPTS[2:], "new"]
    assert cache(tmp_path).fill(prompts, lambda: encoder, batch_size=2) == 4
    assert encoder.batches == [PROMPTS[2:4], [NEGATIVE, "new"]]
    assert cache(tmp_path).fill(prompts, forbidden) == 0
    for other in ({"model": "model@2"}, {"length": 77}, {"dtype": torch.float16}):
        assert cache(tmp_path, **other).missing(PROMPTS) == PROMPTS, "an embedding depends on it"


def test_the_encoder_is_freed(tmp_path):
    references = []
    cache(tmp_path).fill(PROMPTS, lambda: references.append(weakref.ref(encoder := Encoder())) or encoder)
    assert references[0]() is None


def test_memory_holds_a_few_prompts_and_what_is_not_there_is_named(tmp_path):
    two = sum(sum(part.nbytes for part in row.values()) for row in encoded(PROMPTS[-2:]))
    store = cache(tmp_path, memory_bytes=two)
    store.fill(PROMPTS, Encoder)
    store.get(PROMPTS)
    for path in files(tmp_path):
        path.unlink()
    store.get(PROMPTS[-2:])
    for prompt in ("a red cube", "never seen"):
        with pytest.raises(TextCacheError, match=f"{prompt}.*fill"):
            store.get([prompt])


# --- damage ----------------------------------------------------------------------------------------------------------

OTHER = b'{"tokens":[],"pooled":{}}'
DAMAGE = {
    "with tail": lambda content: content + b"\0",
    "garbage": lambda content: bytes(range(256)) * 4,
    "huge header": lambda content: struct.pack("<Q", 2**62) + content[8:],
    "not JSON": lambda content: content[:8] + b"\xff" * (len(content) - 8),
    "header of something else": lambda content: struct.pack("<Q", len(OTHER)) + OTHER,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_removed_with_a_warning_and_encoded_again(tmp_path, damage):
    store, encoder = cache(tmp_path), Encoder()
    store.fill(PROMPTS, Encoder)
    path = store.path(PROMPTS[0])
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.warns(UserWarning, match=path.name):
        assert store.missing(PROMPTS) == PROMPTS[:1]
    assert not path.exists()
    assert store.fill(PROMPTS, lambda: encoder) == 1
    assert encoder.batches == [PROMPTS[:1]]
    assert_same(cache(tmp_path).get(PROMPTS), Conditions.of(encoded(PROMPTS)))


def test_every_truncation_is_found_and_every_flipped_bit_on_reading(tmp_path):
    cache(tmp_path).fill(PROMPTS[:1], Encoder)
    store = cache(tmp_path)
    path = store.path(PROMPTS[0])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.warns(UserWarning, match="damaged"):
            assert store.missing(PROMPTS[:1]) == PROMPTS[:1]
    for position in (-1, -50, -100):
        content = bytearray(whole)
        content[position] ^= 4
        path.write_bytes(content)
        with pytest.warns(UserWarning, match="checksum"), pytest.raises(TextCacheError, match="a red cube.*damaged"):
            store.get(PROMPTS[:1])
        assert store.missing(PROMPTS[:1]) == PROMPTS[:1]  # so the next run repairs it


def test_crash_while_encoding_keeps_what_was_done(tmp_path):
    class Crashing(Encoder):
        def __call__(self, prompts):
            if len(self.batches) == 2:
                raise RuntimeError("power cut")
            return super().__call__(prompts)

    with pytest.raises(RuntimeError, match="power cut"):
        cache(tmp_path).fill(PROMPTS, Crashing, batch_size=1)
    assert cache(tmp_path).missing(PROMPTS) == PROMPTS[2:]


def test_crash_at_any_write_leaves_no_half_file(tmp_path, monkeypatch):
    def crash(*_args):
        raise OSError(28, "No space left on device")

    for owner, name, fails in (
        (os, "replace", crash),
        (Path, "write_bytes", lambda self, content: (self.touch(), crash())),
    ):
        with monkeypatch.context() as patch, pytest.raises(FolderError, match="No space left"):
            patch.setattr(owner, name, fails)
            cache(tmp_path).fill(PROMPTS, Encoder)
        assert files(tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(TextCacheError, match=rf"1,000 free.* {len(PROMPTS)} prompts"):  # before anything is written
        cache(tmp_path).fill(PROMPTS, Encoder, batch_size=2)
    assert files(tmp_path) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FolderError, match="text cache"):
        cache(tmp_path / "file" / "cache").fill(PROMPTS, Encoder)


def test_embeddings_that_cannot_be_stored_are_refused(tmp_path):
    """Not finite, too large for the stored dtype, or fewer than asked for; gradients are left off."""

    def fill(change, dtype=torch.float32):
        rows = encoded(PROMPTS)
        cache(tmp_path, dtype=dtype).fill(PROMPTS, lambda: lambda prompts: change(rows))

    for bad in (float("nan"), float("inf")):
        with pytest.raises(TextCacheError, match="a blue ball.*not finite"):
            fill(lambda rows, bad=bad: rows[PROMPTS.index("a blue ball")]["tokens"][0, 0].fill_(bad) is None or rows)
        assert cache(tmp_path).missing(["a blue ball"])
    with pytest.raises(TextCacheError, match="float16"):
        fill(lambda rows: [row | {"tokens": row["tokens"] * 1e6} for row in rows], torch.float16)
    with pytest.raises(ValueError):
        fill(lambda rows: rows[1:])
    fill(lambda rows: [row | {"tokens": row["tokens"].requires_grad_()} for row in rows])
    assert not cache(tmp_path).get(PROMPTS)["tokens"].requires_grad


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3, 7])
def test_processes_share_the_work_whatever_the_order_they_run_in(tmp_path, world):
    """One that starts late sees files of the others, and still encodes exactly its own share; so does one that starts
    together with them, and sees nothing of their work (here: in a folder of its own)."""
    prompts = [f"prompt {i}" for i in range(20)]
    for folders in ([tmp_path / "shared"] * world, [tmp_path / str(rank) for rank in range(world)]):
        encoders = [Encoder() for _ in range(world)]
        for rank in reversed(range(world)):
            cache(folders[rank]).fill(prompts * 2, lambda own=encoders[rank]: own, rank=rank, world=world)
        assert sorted(sum((batch for encoder in encoders for batch in encoder.batches), [])) == sorted(prompts)
    assert cache(tmp_path / "shared").missing(prompts) == []


def test_two_runs_at_once_leave_whole_files(tmp_path):
    prompts = [f"prompt {i}" for i in range(60)]
    fork(lambda _: cache(tmp_path).fill(prompts, Encoder, batch_size=4), 2)
    assert cache(tmp_path).fill(prompts, forbidden) == 0
    assert_same(cache(tmp_path).get(prompts), Conditions.of(encoded(prompts)))
    assert len(files(tmp_path)) == 60


# --- conditions ------------------------------------------------------------------------------------------------------


def test_rows_of_different_lengths_are_padded_and_found_again():
    rows = encoded(["a", "a b c", "a b"])
    batch = Conditions.of(rows)
    assert batch.lengths == (2, 4, 3) and batch["tokens"].shape == (3, 4, 6) and batch["pooled"].shape == (3, 3)
    assert batch.mask().tolist() == [[True] * n + [False] * (4 - n) for n in batch.lengths]
    assert not batch["tokens"][~batch.mask()].any()
    for alone, row in zip(batch.each(), rows, strict=True):
        assert_same(alone, Conditions.of([row]))
    assert Conditions.of(rows[:1]).lengths is Conditions.of(rows[:1]).mask() is None
    with pytest.raises(ValueError, match="different text encoders"):
        Conditions.of([rows[0], {"tokens": rows[1]["tokens"]}])


def test_conditions_expand_index_and_join():
    both = Conditions.of(encoded(["a", "b c"]))
    one, two = both.index(0), both.index(1)
    assert len(one) == 1 and one.lengths == (2,) and torch.equal(one["pooled"][0], both["pooled"][0])
    assert_same(Conditions.cat([one, two]), both)
    assert_same(Conditions.cat(both.each()), both)
    assert_same(both.index([1, 0]).index([1, 0]), both)
    wide = one.expand(4)
    assert len(wide) == 4 and wide.lengths == (2,) * 4 and wide["tokens"].data_ptr() == one["tokens"].data_ptr()
    assert_same(both.expand(2), both)
    with pytest.raises(ValueError, match="2 samples to 3"):
        both.expand(3)
