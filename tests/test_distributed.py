"""Randomness keyed by counters, and what the collectives promise with one process."""

from __future__ import annotations

import pytest
import torch

from diffusionopd import distributed
from diffusionopd.distributed import Stream, fingerprint, generator, noise


def test_noise_of_a_sample_depends_on_its_key_alone():
    keys = [(Stream.LATENT, 1, 0, 0, i) for i in range(6)]
    together = noise((4, 3, 3), keys)
    assert together.shape == (6, 4, 3, 3)
    assert together.dtype == torch.float32
    torch.manual_seed(123)
    for i in reversed(range(6)):
        assert torch.equal(noise((4, 3, 3), [keys[i]])[0], together[i])


def test_every_part_of_the_key_matters_and_the_numbers_are_normal():
    keys = [(s, a, b) for s in range(3) for a in range(10) for b in range(10)]
    values = noise((1000,), keys)
    assert len({tuple(row[:3].tolist()) for row in values}) == len(keys)
    assert abs(values.mean().item()) < 5 / values.numel() ** 0.5
    assert values.std().item() == pytest.approx(1.0, abs=0.01)
    correlation = torch.corrcoef(values[:50])
    assert (correlation - torch.eye(50)).abs().max() < 0.2
    assert not torch.equal(noise((5,), [(1, 2)]), noise((5,), [(1, 2, 0)]))


def test_negative_keys_are_refused():
    with pytest.raises(ValueError, match="non-negative"):
        generator(1, -1)


def test_fingerprints_tell_tensors_apart():
    tensors = [torch.randn(5), torch.randn(2, 2)]
    assert fingerprint(tensors) == fingerprint([t.clone() for t in tensors])
    tensors[1][0, 0] += 1e-3
    assert fingerprint(tensors) != fingerprint([torch.randn(5)])


def test_a_parameter_without_gradient_keeps_none(monkeypatch):
    """Two processes imitated by a sum that doubles: the mean is the gradient itself; no gradient stays no gradient."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "sum_over_processes", lambda value, *_: 2 * value)
    reached, unreached = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))
    (reached * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    distributed.average_gradients([unreached, reached])
    assert unreached.grad is None
    assert torch.equal(reached.grad, torch.tensor([1.0, 2.0, 3.0]))


def test_together_raises_on_every_process(monkeypatch):
    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        distributed.together(fail, "saving")
    done = []
    distributed.together(lambda: done.append(1), "saving")
    assert done == [1]
    monkeypatch.setattr(distributed, "meet", lambda what, word, timeout: [word, 1])  # another process failed
    monkeypatch.setattr(distributed, "gather_over_processes", lambda texts, what: [*texts, "disk full"])
    with pytest.raises(distributed.OtherProcessError, match="saving failed on rank 1: disk full$"):
        distributed.together(lambda: done.append(2), "saving")


def test_texts_are_grouped_by_rank():
    assert distributed.by_rank(["", "", ""]) == ""
    assert distributed.by_rank(["a", "", "b", "a"]) == "ranks 0, 3: a; rank 2: b"
