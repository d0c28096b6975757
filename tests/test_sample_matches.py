"""sample_matches: what is drawn for given keys equals reference/matching.py, and the keys make the draw fair."""

import numpy as np
import pytest
import torch

import detops
from detops import _library
from inputs import to_torch
from reference import matching as reference


def matches_of(images, anchors, seed=0, shares=(0.1, 0.6, 0.3)):
    """Positives, negatives and neither in these shares."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(3, (images, anchors), p=shares)
    return np.where(kinds == 0, rng.integers(0, 50, kinds.shape), -kinds)


def keys_of(shape, kind="random", seed=0):
    rng = np.random.default_rng(seed)
    if kind == "random":
        return rng.integers(-(2**31), 2**31, shape, dtype=np.int32)
    if kind == "low_bits":  # differ in the last of the digits only
        return (rng.integers(0, 700, shape) - 350).astype(np.int32)
    if kind == "extremes":
        return rng.choice(np.array([-(2**31), 2**31 - 1, -1, 0], np.int32), shape)
    assert kind == "equal"
    return np.full(shape, 77, np.int32)


def check(device, matches, keys, size, most_positives):
    """The op, given keys, equals the reference."""
    found = _library.ops.sample_matches(device.put(matches), device.put(keys), size, most_positives)
    assert all(each.dtype == torch.int64 for each in found) and found[0].shape == (len(matches), size)
    for image in range(len(matches)):
        expected = reference.sample_matches(matches[image], keys[image], size, most_positives)
        assert tuple(each[image].tolist() for each in found) == expected


@pytest.mark.parametrize("kind", ["random", "low_bits", "extremes", "equal"])
@pytest.mark.parametrize("anchors", [0, 1, 31, 33, 511, 513, 1500])
def test_draw_for_given_keys(device, anchors, kind):
    matches = matches_of(2, device.limit(anchors, emulated=600))
    keys = keys_of(matches.shape, kind)
    for size, most_positives in ((0, 0), (1, 0), (1, 1), (16, 8), (64, 3), (256, 128), (2000, 2000)):
        check(device, matches, keys, size, most_positives)


@pytest.mark.parametrize("shares", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.5, 0), (0.02, 0.02, 0.96)])
def test_kinds_that_are_missing(device, shares):
    matches = matches_of(2, 300, shares=shares)
    for size, most_positives in ((20, 10), (400, 100), (20, 0)):
        check(device, matches, keys_of(matches.shape), size, most_positives)


def test_many_anchors(device):
    matches = matches_of(3, device.limit(50_000, emulated=1500), shares=(0.01, 0.95, 0.04))
    check(device, matches, keys_of(matches.shape), 256, 128)


def test_samples(device):
    matches = device.put(matches_of(3, 400))
    samples = detops.sample_matches(matches, 64, 0.25)
    assert isinstance(samples, detops.Samples) and samples.indices.device == matches.device
    assert samples.positive_counts.tolist() == [16] * 3 and samples.counts.tolist() == [64] * 3
    drawn = matches.gather(1, samples.indices)
    assert (drawn[:, :16] >= 0).all() and (drawn[:, 16:] == -1).all()
    for part in (samples.indices[:, :16], samples.indices[:, 16:]):
        assert (part.diff() > 0).all()
    few = detops.sample_matches(matches[:, :20], 64, 0.25)
    assert few.positive_counts.tolist() == (matches[:, :20] >= 0).sum(1).tolist()
    assert few.counts.tolist() == (matches[:, :20] >= -1).sum(1).tolist()
    assert all((row[count:] == -1).all() for row, count in zip(few.indices, few.counts.tolist(), strict=True))


def test_takes_the_result_of_a_matching(device):
    anchors = device.put([[0.0, 0, 10, 10], [50, 50, 60, 60], [80, 80, 90, 90]])
    found = detops.match_max_iou(anchors, anchors[None, :1], high_threshold=0.7, low_threshold=0.3)
    samples = detops.sample_matches(found, 2, 0.5)
    assert samples.indices[0, 0] == 0 and samples.indices[0, 1] in (1, 2) and samples.counts.tolist() == [2]


def test_the_number_of_positives_is_rounded_down(device):
    matches = torch.zeros(1, 20, dtype=torch.int64, device=device.torch)
    for size, fraction in ((7, 0.5), (9, 1 / 3), (10, 0.29), (5, 1.0), (5, 0.0), (512, 0.25)):
        samples = detops.sample_matches(matches, size, fraction)
        assert samples.positive_counts.tolist() == [min(20, int(size * fraction))]


def test_reproducible_by_generator(device):
    matches = device.put(matches_of(2, 300))

    def draw(seed):
        generator = torch.Generator(device.torch).manual_seed(seed)
        return detops.sample_matches(matches, 32, 0.5, generator=generator).indices

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    torch.manual_seed(5)
    first = detops.sample_matches(matches, 32, 0.5).indices
    torch.manual_seed(5)
    assert torch.equal(detops.sample_matches(matches, 32, 0.5).indices, first)


def test_all_are_equally_likely(device):
    rounds = device.limit(3000, emulated=20)
    matches = torch.tensor([0] * 8 + [-1] * 16 + [-2] * 4, device=device.torch).expand(rounds, -1)
    generator = torch.Generator(device.torch).manual_seed(0)
    samples = detops.sample_matches(matches, 8, 0.5, generator=generator)
    assert samples.counts.tolist() == [8] * rounds
    times = torch.bincount(samples.indices.flatten(), minlength=28).tolist()
    for part, share in ((times[:8], 4 / 8), (times[8:24], 4 / 16)):
        spread = 5 * (rounds * share * (1 - share)) ** 0.5
        assert all(abs(count - rounds * share) < spread for count in part)
    assert times[24:] == [0] * 4


def test_any_strides(device):
    matches = device.put(matches_of(60, 3)).t()
    keys = device.put(keys_of((60, 6))).t()[::2]
    found = _library.ops.sample_matches(matches, keys, 16, 8)
    expected = _library.ops.sample_matches(matches.contiguous(), keys.contiguous(), 16, 8)
    assert all(map(torch.equal, found, expected))


def test_empty(device):
    for shape in ((0, 9), (2, 0)):
        samples = detops.sample_matches(torch.zeros(shape, dtype=torch.int64, device=device.torch), 4, 0.5)
        assert samples.indices.shape == (shape[0], 4) and (samples.indices == -1).all()
        assert samples.counts.tolist() == samples.positive_counts.tolist() == [0] * shape[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((-1, 0.5), "batch_size_per_image must be at least 0, got -1"),
        ((4, 1.5), "positive_fraction must be from 0 to 1, got 1.5"),
        ((4, float("nan")), "positive_fraction must be from 0 to 1, got nan"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"^sample_matches: {message}$"):
        detops.sample_matches(torch.zeros(1, 9, dtype=torch.int64), *options)


def test_bad_tensors(device):
    with pytest.raises(RuntimeError, match=r"^sample_matches: matches must have shape \[B, A\], got \[9\]$"):
        detops.sample_matches(torch.zeros(9, dtype=torch.int64, device=device.torch), 4, 0.5)
    with pytest.raises(RuntimeError, match=r"^sample_matches: matches must be int64, got int32$"):
        detops.sample_matches(torch.zeros(1, 9, dtype=torch.int32, device=device.torch), 4, 0.5)


def test_opcheck(device):
    matches = matches_of(2, 40)
    arguments = device.put(matches), device.put(keys_of(matches.shape)), 16, 8
    torch.library.opcheck(_library.ops.sample_matches, arguments)


@pytest.mark.needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
def test_compile_in_one_graph(device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda matches: detops.sample_matches(matches, 16, 0.5), fullgraph=True)
    matches = device.put(matches_of(2, 90))
    samples = compiled(matches)
    drawn = matches.gather(1, samples.indices)
    assert samples.counts.tolist() == [16] * 2 and (drawn >= -1).all()
    assert ((drawn >= 0).sum(1) == samples.positive_counts).all()


def test_export():
    class Sample(torch.nn.Module):
        def forward(self, matches):
            return detops.sample_matches(matches, 16, 0.5)

    anchors = torch.export.Dim("anchors")
    program = torch.export.export(Sample(), (to_torch(matches_of(2, 50)),), dynamic_shapes=({1: anchors},))
    matches = to_torch(matches_of(2, 90))
    assert (matches.gather(1, program.module()(matches).indices) >= -1).all()


def test_any_number_of_threads_gives_the_same(restore_threads, device):
    matches, keys = device.put(matches_of(5, 300)), device.put(keys_of((5, 300)))
    first = _library.ops.sample_matches(matches, keys, 32, 16)
    for threads in (1, 3, 8):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, _library.ops.sample_matches(matches, keys, 32, 16), first))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_no_synchronisation(device):
    matches = device.put(matches_of(2, 400))
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        detops.sample_matches(matches, 32, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode(before)
