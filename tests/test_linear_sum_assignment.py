"""linear_sum_assignment: optimal, as scipy and exhaustive search find it, and the same on every device."""

from fractions import Fraction

import numpy as np
import pytest
import torch

import detops
from detops import _library
from inputs import to_numpy, to_torch
from reference import linear_sum_assignment as reference

# Around the CPU's 8 lanes and the GPU's warps and 256 threads.
SHAPES = [(1, 1), (2, 1), (1, 2), (7, 3), (3, 7), (8, 8), (9, 8), (31, 33), (33, 31), (40, 40), (257, 5), (5, 257)]


def scipy_result(cost):
    """The query of each target, and the total."""
    optimize = pytest.importorskip("scipy.optimize")
    queries, targets = optimize.linear_sum_assignment(cost)
    found = np.full(cost.shape[1], -1)
    found[targets] = queries
    return found, float(np.asarray(cost, np.float64)[queries, targets].sum())


def random_costs(images, queries, targets, seed=0, kind="uniform"):
    rng = np.random.default_rng(seed)
    shape = images, queries, targets
    if kind == "uniform":
        return rng.random(shape)
    if kind == "ties":
        return rng.integers(0, 4, shape).astype(float)
    if kind == "negative":
        return rng.normal(0, 1000, shape)
    if kind == "ranks":  # all targets want the same queries: the longest searches
        return np.outer(np.arange(1, queries + 1), np.arange(1, targets + 1))[None] * np.ones((images, 1, 1))
    assert kind == "scales"
    return np.exp(rng.uniform(-20, 20, shape))


KINDS = ("uniform", "ties", "negative", "ranks", "scales")


def check(cost, num_targets=None):
    """The assignment is valid, and as cheap as scipy's; equal to it where all costs are distinct reals."""
    found = detops.linear_sum_assignment(cost, num_targets)
    assert found.dtype == torch.int64 and found.device == cost.device and found.shape == cost.shape[::2]
    array, counts = to_numpy(cost), [cost.shape[2]] * len(cost) if num_targets is None else num_targets.tolist()
    for image, (queries, count) in enumerate(zip(to_numpy(found), counts, strict=True)):
        assert reference.is_assignment(queries, array.shape[1], count)
        expected, total = scipy_result(array[image][:, :count])
        assert (queries >= 0).sum() == min(array.shape[1], count)
        assert reference.total_cost(array[image], queries)[1] == pytest.approx(total, rel=1e-12, abs=1e-12)
        if len(np.unique(array[image])) == array[image].size:
            assert queries[:count].tolist() == expected.tolist()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("queries", "targets"), SHAPES)
def test_equals_scipy(device, queries, targets, kind):
    if device.name == "emulated" and max(queries, targets) > 100 and kind != "uniform":
        pytest.skip("large problems take long under emulation")
    cost = device.put(random_costs(2, queries, targets, kind=kind), torch.float64)
    check(cost)
    check(cost.float() if kind != "scales" else cost.float().double())


@pytest.mark.parametrize("seed", range(3))
def test_is_optimal(device, seed):
    rng = np.random.default_rng(seed)
    for _ in range(device.limit(60, emulated=6)):
        queries, targets = rng.integers(1, 5, 2)
        cost = rng.integers(-3, 9, (2, queries, targets)).astype(np.float64)
        cost[rng.random(cost.shape) < 0.3] = np.inf
        found = to_numpy(detops.linear_sum_assignment(device.put(cost, torch.float64)))
        for image in range(2):
            assert reference.is_assignment(found[image], queries, targets)
            got = reference.total_cost(cost[image], found[image])
            assert got == reference.linear_sum_assignment(cost[image])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_large_problems(device, dtype):
    if device.name == "emulated":
        cost = random_costs(1, 300, 12)
    else:
        cost = random_costs(3, 300, 100)
        check(device.put(random_costs(1, 200, 200, kind="ranks"), torch.float64))
        check(device.put(random_costs(1, 100, 300, kind="negative"), torch.float64))
    check(device.put(cost, getattr(torch, dtype)))


def test_problem_beyond_shared_memory(device):
    # More columns than a block of the GPU has shared memory for.
    check(device.put(random_costs(1, 2100, 2), torch.float64))


def test_all_costs_equal(device):
    # Ties are settled at free columns, so that no search is long, and in the order of indices.
    for queries, targets in ((40, 30), (30, 40)):
        found = detops.linear_sum_assignment(torch.zeros(1, queries, targets, device=device.torch))
        assert sorted(found[0].tolist()) == sorted([*range(min(queries, targets)), *[-1] * (targets - queries)])


def test_number_of_targets(device):
    cost = device.put(random_costs(5, 9, 12), torch.float64)
    counts = device.put(np.array([0, 1, 9, 10, 12]))
    padded = cost.clone()
    padded[torch.arange(12, device=cost.device) >= counts[:, None, None].expand(5, 9, 1)] = float("nan")
    assert torch.equal(check(padded, counts), check(cost, counts))
    for dtype in (torch.float32, torch.float16):
        check(cost.to(dtype).contiguous(), counts)


def test_dtypes(device, scores_dtype):
    cost = device.put(random_costs(2, 20, 9), scores_dtype)
    found = check(cost)
    assert torch.equal(found, detops.linear_sum_assignment(cost.double()))
    whole = device.put(random_costs(2, 20, 9, kind="ties"), torch.int64)
    assert torch.equal(detops.linear_sum_assignment(whole), detops.linear_sum_assignment(whole.double()))


def test_any_strides(device):
    cost = device.put(random_costs(4, 24, 20), torch.float64)
    views = cost[::2, :, ::2], cost.transpose(1, 2), cost.transpose(0, 1)[:, :3], cost[:1].expand(3, 24, 20)
    for view in views:
        before = view.clone()
        assert torch.equal(check(view), detops.linear_sum_assignment(view.contiguous()))
        assert torch.equal(view, before)


def test_empty(device):
    for shape in ((0, 4, 3), (2, 4, 0), (2, 0, 3), (2, 0, 0)):
        found = detops.linear_sum_assignment(torch.zeros(shape, device=device.torch))
        assert found.shape == (shape[0], shape[2]) and (found == -1).all()


def test_infinity_forbids_a_pair(device):
    inf = np.inf
    cost = device.put([[[1, inf, inf], [2, 1, inf], [inf, 2, inf]], [[1, inf, 5], [2, inf, 4], [3, inf, 9]]])
    assert detops.linear_sum_assignment(cost).tolist() == [[0, 1, -1], [0, -1, 1]]
    assert (detops.linear_sum_assignment(torch.full((1, 3, 2), inf, device=device.torch)) == -1).all()
    # Two targets want the only query, so that one of them goes without: the dearer, wherever it stands.
    assert detops.linear_sum_assignment(device.put([[[5.0, 3.0], [inf, inf]]])).tolist() == [[-1, 0]]
    assert detops.linear_sum_assignment(device.put([[[-3.0, 5.0], [inf, inf]]])).tolist() == [[0, -1]]
    # As many pairs as possible come first, at any cost.
    assert detops.linear_sum_assignment(device.put([[[0.0, 1e6], [inf, 0.0], [inf, inf]]])).tolist() == [[0, 1]]
    assert detops.linear_sum_assignment(device.put([[[0.0, 0.0], [inf, 1e9]]])).tolist() == [[0, 1]]
    for seed in range(4):
        drawn = random_costs(1, 30, 20, seed)
        drawn[np.random.default_rng(seed).random(drawn.shape) < 0.8] = inf
        cost = device.put(drawn, torch.float64)
        found = to_numpy(detops.linear_sum_assignment(cost))[0]
        large = np.where(np.isinf(drawn[0]), 1e4, drawn[0])
        expected, _ = scipy_result(large)
        expected[np.isinf(drawn[0][expected, np.arange(20)])] = -1
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize(("queries", "targets"), [(6, 4), (4, 6), (40, 33)])
def test_invalid_costs(device, bad, queries, targets):
    cost = device.put(random_costs(3, queries, targets), torch.float64)
    cost[1, 2, 3] = bad
    forbidden = cost.clone()
    forbidden[1, 2, 3] = float("inf")
    expected = detops.linear_sum_assignment(forbidden)
    assert torch.equal(detops.linear_sum_assignment(cost), expected)
    assert torch.equal(detops.linear_sum_assignment(cost, invalid="last"), expected)  # enough else is left
    message = r"^linear_sum_assignment: cost must be free of NaN and -inf, got one in problem 1$"
    with pytest.raises(RuntimeError, match=message):
        detops.linear_sum_assignment(cost, invalid="raise")
    assert torch.equal(detops.linear_sum_assignment(forbidden, invalid="raise"), expected)
    counts = device.put(np.array([4, 3, 4]))
    check(cost, counts)
    for invalid in ("forbid", "raise", "last"):
        result = detops.linear_sum_assignment(cost, counts, invalid=invalid)
        assert torch.equal(result, detops.linear_sum_assignment(forbidden, counts))


@pytest.mark.parametrize("invalid", ["forbid", "last"])
@pytest.mark.parametrize("large", [7.0, 1e17, 1e300, 1.7e308])
def test_as_few_invalid_pairs_as_possible_and_then_the_least_sum(device, invalid, large):
    rng = np.random.default_rng(0)
    for _ in range(device.limit(200, emulated=12)):
        queries, targets = rng.integers(1, 6, 2)
        cost = rng.integers(0, 9, (1, queries, targets)).astype(np.float64)
        cost[rng.random(cost.shape) < 0.15] = large * rng.choice([1, 1, 1, -1])
        cost[rng.random(cost.shape) < rng.choice([0.3, 0.6])] = np.inf
        drawn = rng.random(cost.shape) < 0.3
        cost[drawn & np.isinf(cost)] = rng.choice([np.nan, -np.inf])
        found = to_numpy(detops.linear_sum_assignment(device.put(cost, torch.float64), invalid=invalid))[0]
        assert reference.is_assignment(found, queries, targets)
        pairs, total = reference.total_cost(cost[0], found)
        best_pairs, best = reference.linear_sum_assignment(cost[0])
        assert pairs == best_pairs
        if abs(best) < 1e3 and np.where(np.isfinite(cost), cost, 0).min() > -10:
            assert total == best
        else:  # sums of large numbers are rounded
            assert abs(total - best) <= Fraction(large) / 10**9
        assert (found >= 0).sum() == (min(queries, targets) if invalid == "last" else best_pairs)


@pytest.mark.parametrize(("queries", "targets"), [(33, 20), (20, 33), (64, 64)])
def test_pairs_that_come_last_in_larger_problems(device, queries, targets):
    for share in (0.5, 0.9, 1.0):
        if device.name == "emulated" and queries == targets:
            continue
        cost = random_costs(1, queries, targets)[0] * 100 // 1
        cost[np.random.default_rng(0).random(cost.shape) < share] = np.nan
        cost[:, :2] = cost[:3] = np.inf
        found = to_numpy(detops.linear_sum_assignment(device.put(cost[None], torch.float64), invalid="last"))[0]
        assert reference.is_assignment(found, queries, targets) and (found >= 0).sum() == min(queries, targets)
        # Integers below 2^53, so that a large number in the place of NaN is exact here.
        _, total = scipy_result(np.where(np.isfinite(cost), cost, 1e6))
        pairs, own = reference.total_cost(cost, found)
        assert own + (min(queries, targets) - pairs) * 1e6 == total
        kept = to_numpy(detops.linear_sum_assignment(device.put(cost[None], torch.float64)))[0]
        assert (kept == np.where([q >= 0 and np.isfinite(cost[q, t]) for t, q in enumerate(found)], found, -1)).all()


def test_large_costs_do_not_hide_small_ones(device):
    inf = np.inf
    cost = device.put([[[inf, 5, 0], [1e300, inf, inf], [3, inf, inf], [inf, inf, inf]]], torch.float64)
    assert detops.linear_sum_assignment(cost).tolist() == [[2, -1, 0]]
    assert detops.linear_sum_assignment(cost, invalid="last").tolist() == [[2, 1, 0]]


def test_nothing_but_invalid_costs(device):
    for value in (np.nan, np.inf, -np.inf):
        for queries, targets in ((3, 2), (2, 3)):
            cost = torch.full((1, queries, targets), value, device=device.torch)
            assert (detops.linear_sum_assignment(cost) == -1).all()
            found = detops.linear_sum_assignment(cost, invalid="last")[0]
            assert found.tolist() == [0, 1, -1][:targets]


def test_costs_that_are_vast_by_their_strides():
    cost = torch.zeros(1, 64, 33).expand(2**31 - 1, 64, 33)
    with pytest.raises(RuntimeError, match=r"^linear_sum_assignment: num_targets must have shape \[B\] "):
        detops.linear_sum_assignment(cost, torch.zeros(1, dtype=torch.int64))


def test_option_that_is_unknown():
    message = "^linear_sum_assignment: invalid must be 'forbid', 'raise' or 'last', got 'skip'$"
    with pytest.raises(ValueError, match=message):
        detops.linear_sum_assignment(C, invalid="skip")
    with pytest.raises(RuntimeError, match=r"^linear_sum_assignment: invalid must be 0 .* or 2 \(last\), got 3$"):
        _library.ops.linear_sum_assignment(C, None, 3)
    with pytest.raises(RuntimeError, match="^linear_sum_assignment: cost must be a tensor, got a NumPy array$"):
        detops.linear_sum_assignment(C.numpy())


def test_number_of_targets_out_of_range(device):
    cost = device.put(random_costs(2, 6, 4))
    for counts in ([-1, 2], [2, 5]):
        given = device.put(np.array(counts))
        if device.name == "cpu":
            wrong = next(count for count in counts if count not in range(5))
            message = rf"^linear_sum_assignment: num_targets must be from 0 to T \(4\), got {wrong}$"
            with pytest.raises(RuntimeError, match=message):
                detops.linear_sum_assignment(cost, given)
        else:
            clamped = detops.linear_sum_assignment(cost, given.clamp(0, 4))
            assert torch.equal(detops.linear_sum_assignment(cost, given), clamped)


def test_drawn_costs(device):
    hypothesis = pytest.importorskip("hypothesis")
    numpy_strategies = pytest.importorskip("hypothesis.extra.numpy")
    st = hypothesis.strategies
    shapes = st.tuples(st.just(1), st.integers(1, 5), st.integers(1, 5))
    values = st.sampled_from([0.0, 1.0, 2.0, -1.0, 7.0, np.inf])

    @hypothesis.settings(max_examples=device.limit(150, emulated=15), deadline=None, derandomize=True, database=None)
    @hypothesis.given(numpy_strategies.arrays(np.float64, shapes, elements=values))
    def check_drawn(cost):
        found = to_numpy(detops.linear_sum_assignment(device.put(cost, torch.float64)))[0]
        assert reference.is_assignment(found, *cost.shape[1:])
        assert reference.total_cost(cost[0], found) == reference.linear_sum_assignment(cost[0])

    check_drawn()


def test_devices_break_ties_alike(device):
    # Against the CPU, which is itself checked to be optimal.
    for kind in ("ties", "ranks", "uniform"):
        for queries, targets in ((20, 12), (12, 20), (16, 16)):
            cost = to_torch(random_costs(2, queries, targets, kind=kind), torch.float64)
            if kind == "ties":
                cost[:, ::3, ::2] = float("inf")
            with _library.use_namespace("detops"):
                expected = detops.linear_sum_assignment(cost)
            assert torch.equal(detops.linear_sum_assignment(cost.to(device.torch)).cpu(), expected)


C = torch.zeros(2, 4, 3)


@pytest.mark.parametrize(
    ("cost", "num_targets", "message"),
    [
        (C[0], None, r"cost must have shape \[B, Q, T\], got \[4, 3\]"),
        (C, torch.zeros(3, dtype=torch.int64), r"num_targets must have shape \[B\] with the B of cost, got \[3\]"),
        (C, torch.zeros(2, 1, dtype=torch.int64), r"num_targets must have shape \[B\] .*, got \[2, 1\]"),
        (C, torch.zeros(2), "num_targets must be int64, got float32"),
    ],
)
def test_bad_tensors(device, cost, num_targets, message):
    num_targets = None if num_targets is None else num_targets.to(device.torch)
    with pytest.raises(RuntimeError, match=f"^linear_sum_assignment: {message}$"):
        detops.linear_sum_assignment(cost.to(device.torch), num_targets)


def test_no_gradient(device):
    assert not detops.linear_sum_assignment(C.to(device.torch).requires_grad_()).requires_grad


def test_opcheck(device):
    cost, counts = device.put(random_costs(2, 9, 5)), device.put(np.array([5, 3]))
    for arguments in ((cost, None), (cost, counts, 2), (cost.transpose(1, 2), None, 1), (cost[:, :, :0], None)):
        torch.library.opcheck(_library.ops.linear_sum_assignment, arguments)


@pytest.mark.needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
def test_compile_in_one_graph(device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda cost: detops.linear_sum_assignment(cost) + 1, fullgraph=True)
    for targets in (5, 7):
        cost = device.put(random_costs(2, 9, targets))
        assert torch.equal(compiled(cost), detops.linear_sum_assignment(cost) + 1)


def test_export():
    class Assign(torch.nn.Module):
        def forward(self, cost, counts):
            return detops.linear_sum_assignment(cost, counts)

    example = torch.rand(2, 9, 5), torch.tensor([5, 3])
    program = torch.export.export(Assign(), example, dynamic_shapes=({2: torch.export.Dim("targets")}, {}))
    cost, counts = torch.rand(2, 9, 8), torch.tensor([8, 2])
    assert torch.equal(program.module()(cost, counts), Assign()(cost, counts))


def test_any_number_of_threads_and_every_run_give_the_same(restore_threads, device):
    cost = device.put(random_costs(4, 30, device.limit(25, emulated=10), kind="ties"))
    first = detops.linear_sum_assignment(cost)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert torch.equal(detops.linear_sum_assignment(cost), first)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_no_synchronisation(device):
    cost, counts = device.put(random_costs(2, 40, 9)), device.put(np.array([9, 4]))
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        detops.linear_sum_assignment(cost, counts)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_complex_costs_are_refused():
    with pytest.raises(RuntimeError, match="^linear_sum_assignment: cost must be real, got complex64$"):
        detops.linear_sum_assignment(torch.zeros(1, 2, 2, dtype=torch.complex64))
