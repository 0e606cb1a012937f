"""The text cache: exact round trips, nothing encoded twice, damage found, several writers, a disk that is full."""

import multiprocessing
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
from diffusionopd.models.backbone import load_text_encoder
from diffusionopd.models.conditions import NEGATIVE, Conditions
from diffusionopd.models.text_cache import TextCache, TextCacheError

PROMPTS = ["a red cube", "", "日本語 'quoted'\n", "a blue ball"]


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
        cache(tmp_path, length=9).fill(texts, partial(load_text_encoder, pipeline_folder, max_sequence_length=9), 2)
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
    assert cache(tmp_path, dtype=dtype).fill(PROMPTS, Encoder, batch_size=3) == 4
    got = cache(tmp_path, dtype=dtype).get(PROMPTS[::-1])
    assert got["tokens"].dtype == got["pooled"].dtype == dtype
    assert_same(got, Conditions.of(encoded(PROMPTS[::-1])).to(dtype=dtype))


def test_get_repeats_and_converts(tmp_path):
    store = cache(tmp_path)
    store.fill(PROMPTS, Encoder)
    got = store.get(["a red cube"] * 3, "cpu", torch.float64)
    assert got["tokens"].shape == (3, 4, 6) and got["pooled"].shape == (3, 3)
    assert got["tokens"].dtype == torch.float64 and torch.equal(got["tokens"][0], got["tokens"][2])


def test_complete_cache_never_loads_an_encoder(tmp_path):
    cache(tmp_path).fill(PROMPTS, Encoder)
    assert cache(tmp_path).missing(PROMPTS) == []
    assert cache(tmp_path).fill(PROMPTS * 2, forbidden) == 0


def test_only_what_is_missing_is_encoded_once_each(tmp_path):
    cache(tmp_path).fill(PROMPTS[:2], Encoder)
    encoder = Encoder()
    prompts = [*PROMPTS, *PROMPTS, "new"]
    assert cache(tmp_path).missing(prompts) == [*PROMPTS[2:], "new"]
    assert cache(tmp_path).fill(prompts, lambda: encoder, batch_size=2) == 3
    assert encoder.batches == [PROMPTS[2:], ["new"]]


@pytest.mark.parametrize(
    "other", [{"model": "model@2"}, {"length": 77}, {"dtype": torch.float16}], ids=["model", "length", "dtype"]
)
def test_everything_an_embedding_depends_on_separates_files(tmp_path, other):
    cache(tmp_path).fill(PROMPTS, Encoder)
    assert cache(tmp_path, **other).missing(PROMPTS) == PROMPTS


def test_files_are_spread_over_folders_named_by_their_hash(tmp_path):
    store = cache(tmp_path)
    store.fill([str(i) for i in range(40)], Encoder)
    for path in files(tmp_path):
        assert path.suffix == ".safetensors" and path.name.startswith(path.parent.name) and len(path.parent.name) == 2
    assert len({path.parent for path in files(tmp_path)}) > 20


def test_encoder_is_freed(tmp_path):
    references = []

    def load():
        encoder = Encoder()
        references.append(weakref.ref(encoder))
        return encoder

    cache(tmp_path).fill(PROMPTS, load)
    assert references[0]() is None


def test_memory_holds_a_few_prompts_and_spares_the_disk(tmp_path):
    store = cache(tmp_path, memory_items=2)
    store.fill(PROMPTS, Encoder)
    store.get(PROMPTS)
    for path in files(tmp_path):
        path.unlink()
    store.get(PROMPTS[-2:])
    with pytest.raises(TextCacheError, match="a red cube"):
        store.get(PROMPTS[:1])


def test_returned_tensors_do_not_alias_the_cache(tmp_path):
    store = cache(tmp_path)
    store.fill(PROMPTS, Encoder)
    store.get(PROMPTS[:1])["tokens"].zero_()
    assert_same(store.get(PROMPTS[:1]), Conditions.of(encoded(PROMPTS[:1])))


def test_absent_prompt_is_named(tmp_path):
    with pytest.raises(TextCacheError, match="never seen.*fill"):
        cache(tmp_path).get(["never seen"])


# --- damage ----------------------------------------------------------------------------------------------------------


def truncated(content):
    return content[: len(content) // 2]


def without_last_byte(content):
    return content[:-1]


def with_tail(content):
    return content + b"\0"


def empty(content):
    return b""


def garbage(content):
    return bytes(range(256)) * 4


def huge_header(content):
    return struct.pack("<Q", 2**62) + content[8:]


def not_json(content):
    return content[:8] + b"\xff" * (len(content) - 8)


def header_of_something_else(content):
    header = b'{"tokens":[],"pooled":{}}'
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    "damage",
    [truncated, without_last_byte, with_tail, empty, garbage, huge_header, not_json, header_of_something_else],
    ids=lambda damage: damage.__name__,
)
def test_damaged_file_is_removed_with_a_warning_and_encoded_again(tmp_path, damage):
    store = cache(tmp_path)
    store.fill(PROMPTS, Encoder)
    path = store.path(PROMPTS[0])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=path.name):
        assert store.missing(PROMPTS) == PROMPTS[:1]
    assert not path.exists()
    encoder = Encoder()
    assert store.fill(PROMPTS, lambda: encoder) == 1
    assert encoder.batches == [PROMPTS[:1]]
    assert_same(cache(tmp_path).get(PROMPTS), Conditions.of(encoded(PROMPTS)))


def test_every_truncation_is_found(tmp_path):
    store = cache(tmp_path)
    store.fill(PROMPTS[:1], Encoder)
    path = store.path(PROMPTS[0])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.warns(UserWarning, match="damaged"):
            assert store.missing(PROMPTS[:1]) == PROMPTS[:1]


@pytest.mark.parametrize("position", [-1, -50, -100])
def test_flipped_bit_is_found_on_reading(tmp_path, position):
    cache(tmp_path).fill(PROMPTS, Encoder)
    store = cache(tmp_path)
    path = store.path(PROMPTS[0])
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="checksum"), pytest.raises(TextCacheError, match="a red cube.*damaged"):
        store.get(PROMPTS)
    assert store.missing(PROMPTS) == PROMPTS[:1]  # so the next run repairs it


def test_crash_while_encoding_keeps_what_was_done(tmp_path):
    class Crashing(Encoder):
        def __call__(self, prompts):
            if len(self.batches) == 2:
                raise RuntimeError("power cut")
            return super().__call__(prompts)

    with pytest.raises(RuntimeError, match="power cut"):
        cache(tmp_path).fill(PROMPTS, Crashing, batch_size=1)
    assert cache(tmp_path).missing(PROMPTS) == PROMPTS[2:]


@pytest.mark.parametrize("moment", ["write_bytes", "replace"])
def test_crash_at_any_write_leaves_no_half_file(tmp_path, monkeypatch, moment):
    def crash(*_args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if moment == "replace":
            patch.setattr(os, "replace", crash)
        else:
            patch.setattr(Path, "write_bytes", lambda self, content: (self.touch(), crash()))
        with pytest.raises(FolderError, match="No space left"):
            cache(tmp_path).fill(PROMPTS, Encoder)
    assert files(tmp_path) == []
    assert cache(tmp_path).fill(PROMPTS, Encoder) == len(PROMPTS)


# --- the disk and the encoder ----------------------------------------------------------------------------------------


def test_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(TextCacheError, match="1,000 free"):
        cache(tmp_path).fill(PROMPTS, Encoder, batch_size=2)
    assert files(tmp_path) == []


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FolderError, match="text cache"):
        cache(tmp_path / "file" / "cache").fill(PROMPTS, Encoder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_embedding_that_is_not_finite_is_refused(tmp_path, bad):
    def encode(prompts):
        rows = encoded(prompts)
        rows[prompts.index("a blue ball")]["tokens"][0, 0] = bad
        return rows

    with pytest.raises(TextCacheError, match="a blue ball.*not finite"):
        cache(tmp_path).fill(PROMPTS, lambda: encode)
    assert cache(tmp_path).missing(["a blue ball"])


def test_overflow_of_the_stored_dtype_is_refused(tmp_path):
    def encode(prompts):
        return [row | {"tokens": row["tokens"] * 1e6} for row in encoded(prompts)]

    with pytest.raises(TextCacheError, match="float16"):
        cache(tmp_path, dtype=torch.float16).fill(PROMPTS, lambda: encode)


def test_encoder_that_loses_prompts_is_refused(tmp_path):
    with pytest.raises(ValueError):
        cache(tmp_path).fill(PROMPTS, lambda: lambda prompts: encoded(prompts[1:]))


def test_encoder_with_gradients_is_accepted(tmp_path):
    def encode(prompts):
        return [row | {"tokens": row["tokens"].requires_grad_()} for row in encoded(prompts)]

    cache(tmp_path).fill(PROMPTS, lambda: encode)
    assert not cache(tmp_path).get(PROMPTS)["tokens"].requires_grad


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3, 7])
def test_processes_share_the_work_whatever_the_order_they_run_in(tmp_path, world):
    """A process that starts late sees files of the others, and still encodes exactly its own share."""
    prompts = [f"prompt {i}" for i in range(20)]
    encoders = [Encoder() for _ in range(world)]
    for rank in reversed(range(world)):
        cache(tmp_path).fill(prompts, lambda rank=rank: encoders[rank], rank=rank, world=world)
    encoded = [prompt for encoder in encoders for batch in encoder.batches for prompt in batch]
    assert sorted(encoded) == sorted(prompts)
    assert cache(tmp_path).missing(prompts) == []


def test_shares_are_disjoint_when_processes_start_together(tmp_path):
    """Each process of its own folder stands for one that saw nothing of the others' work yet."""
    prompts = [f"prompt {i}" for i in range(20)] * 2
    encoders = [Encoder() for _ in range(3)]
    for rank, encoder in enumerate(encoders):
        cache(tmp_path / str(rank)).fill(prompts, lambda encoder=encoder: encoder, rank=rank, world=3)
    encoded = [prompt for encoder in encoders for batch in encoder.batches for prompt in batch]
    assert sorted(encoded) == sorted(set(prompts))


def fill_in_a_process(folder, rank, world, count):
    cache(folder).fill([f"prompt {i}" for i in range(count)], Encoder, batch_size=4, rank=rank, world=world)


@pytest.mark.parametrize("world", [1, 2], ids=["two runs at once", "one run, two processes"])
def test_two_writers_leave_whole_files(tmp_path, world):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=fill_in_a_process, args=(tmp_path, i % world, world, 60)) for i in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    prompts = [f"prompt {i}" for i in range(60)]
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
    assert Conditions.of(rows, 64)["tokens"].shape == (3, 64, 6)
    assert Conditions.of(rows[:1], 64).lengths is Conditions.of(rows[:1]).mask() is None
    with pytest.raises(ValueError, match="different text encoders"):
        Conditions.of([rows[0], {"tokens": rows[1]["tokens"]}])


def test_conditions_expand_index_and_join():
    both = Conditions.of(encoded(["a", "b c"]))
    one, two = both.index(0), both.index(1)
    assert len(one) == 1 and one.lengths == (2,) and torch.equal(one["pooled"][0], both["pooled"][0])
    assert_same(Conditions.cat([one, two]), both)
    assert_same(Conditions.cat(both.each()), both)
    assert_same(both.index([1, 0]).index([1, 0]), both)
    assert_same(both.index(slice(0, 1)), one)
    wide = one.expand(4)
    assert len(wide) == 4 and wide.lengths == (2,) * 4 and wide["tokens"].data_ptr() == one["tokens"].data_ptr()
    assert_same(both.expand(2), both)
    with pytest.raises(ValueError, match="2 samples to 3"):
        both.expand(3)


def test_the_negative_prompt_is_an_entry_of_its_own(tmp_path):
    store, encoder = cache(tmp_path), Encoder()
    store.fill([NEGATIVE, ""], lambda: encoder)
    assert encoder.batches == [[NEGATIVE, ""]]
    assert store.path(NEGATIVE) != store.path("")
    assert len(store.get([NEGATIVE])) == 1
