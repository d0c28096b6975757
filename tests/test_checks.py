"""The checks that all families share: what is no tensor, no integer, no number."""

import re

import numpy as np
import pytest
import torch
import torch._dynamo.testing

from detops import _checks

NO_TENSORS = [
    (np.zeros((1, 4)), "a NumPy array"),
    ([[0.0]], "a list"),
    (None, "None"),
    (1.5, "a float"),
    (1, "an int"),
]


@pytest.mark.parametrize("value, kind", NO_TENSORS)
def test_what_is_no_tensor_is_named(value, kind):
    with pytest.raises(RuntimeError, match=f"^op: second must be a tensor, got {kind}$"):
        _checks.check_tensors("op", first=torch.zeros(1), second=value)
    with pytest.raises(RuntimeError, match=re.escape(f"op: boxes[1] must be a tensor, got {kind}")):
        _checks.check_tensor_list("op", "boxes", [torch.zeros(1), value])
    if value is not None:
        with pytest.raises(RuntimeError, match=f"^op: valid must be a tensor or None, got {kind}$"):
            _checks.check_optional_tensors("op", valid=value)


def test_lists_of_tensors_are_lists():
    _checks.check_tensor_list("op", "boxes", (torch.zeros(1),))
    with pytest.raises(RuntimeError, match="^op: boxes must be a list of tensors, got a Tensor$"):
        _checks.check_tensor_list("op", "boxes", torch.zeros(1))


def test_tensors_of_all_kinds_pass():
    class Own(torch.Tensor):
        pass

    with torch._subclasses.FakeTensorMode():
        fake = torch.zeros(1)
    for each in (torch.zeros(1), torch.nn.Parameter(torch.zeros(1)), torch.zeros(1).as_subclass(Own), fake):
        _checks.check_tensors("op", tensor=each)
        _checks.check_optional_tensors("op", tensor=each, other=None)


def test_tracing_of_torch_fx_passes():
    def traced(tensor, option):
        _checks.check_tensors("op", tensor=tensor)
        _checks.check_optional_tensors("op", tensor=tensor)
        _checks.check_tensor_list("op", "tensor", [tensor])
        return tensor * _checks.integer("op", "option", option) * _checks.number("op", "option", option)

    graph = torch.fx.symbolic_trace(traced)
    assert graph(torch.ones(1), 3).item() == 9


@pytest.mark.parametrize("value", [7, np.int64(7), np.uint8(7), np.array(7), torch.tensor(7)])
def test_integers_of_all_kinds(value):
    given = _checks.integer("op", "k", value)
    assert type(given) is int and given == 7
    assert _checks.integers("op", "k", [value, 2]) == (7, 2)


def test_integers_and_numbers_that_do_not_fit_are_refused():
    assert _checks.integer("op", "k", 2**63 - 1) == 2**63 - 1 and _checks.number("op", "eps", 10**30) == 1e30
    with pytest.raises(ValueError, match="^op: k must be an integer of 64 bits, got 9223372036854775808$"):
        _checks.integer("op", "k", 2**63)
    with pytest.raises(ValueError, match="^op: eps must be a number, got 1000"):
        _checks.number("op", "eps", 10**400)


@pytest.mark.parametrize("value, fact", [(2.5, "2.5"), (7.0, "7.0"), ("7", "'7'"), (None, "None"), ([7], "a list")])
def test_what_is_no_integer_is_refused_by_name(value, fact):
    with pytest.raises(ValueError, match=f"^op: k must be an integer, got {fact}$"):
        _checks.integer("op", "k", value)
    with pytest.raises(ValueError, match=f"^op: k must be an integer, got {fact}$"):
        _checks.integers("op", "k", [1, value])


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5)])
def test_numbers_of_all_kinds(value):
    given = _checks.number("op", "eps", value)
    assert type(given) is float and given == 0.5
    assert _checks.numbers("op", "eps", (value, 2)) == (0.5, 2)
    assert type(_checks.number("op", "eps", np.int64(2**60 + 1))) is int


@pytest.mark.parametrize(
    "value, fact",
    [
        ("0.5", "'0.5'"),
        (None, "None"),
        ([1], "a list"),
        (torch.ones(2), "a Tensor"),
    ],
)
def test_what_is_no_number_is_refused_by_name(value, fact):
    with pytest.raises(ValueError, match=f"^op: eps must be a number, got {fact}$"):
        _checks.number("op", "eps", value)


def test_what_is_no_sequence_is_refused_by_name():
    with pytest.raises(ValueError, match="^op: weights must be a sequence of numbers, got 1.5$"):
        _checks.numbers("op", "weights", 1.5)
    with pytest.raises(ValueError, match="^op: sizes must be a sequence of integers, got None$"):
        _checks.integers("op", "sizes", None)


def test_symbols_stay_symbols():
    graphs = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=graphs, dynamic=True, fullgraph=True)
    def compiled(tensor):
        return tensor * _checks.integer("op", "k", tensor.shape[0])

    assert [compiled(torch.ones(size))[0].item() for size in (3, 4, 5)] == [3, 4, 5]
    assert graphs.frame_count == 1


def test_sizes_stay_open_in_a_trace():
    def grown(tensor):
        return tensor.new_ones(_checks.integers("op", "sizes", tensor.shape)) * _checks.number("op", "k", len(tensor))

    traced = torch.jit.trace(grown, torch.zeros(2, 3))
    assert traced(torch.zeros(5, 4)).shape == (5, 4)
