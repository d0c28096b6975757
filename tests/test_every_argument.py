"""Every tensor argument of every public function refuses what is no tensor, and every option takes NumPy's numbers.

The calls, and what is a tensor or an option, are those of tests/fuzz_arguments.py.
"""

import functools
import inspect
import re
import typing
from types import UnionType

import numpy as np
import pytest
import torch

import detops
import fuzz
import fuzz_arguments

TARGETS = {name: each for name, each in fuzz_arguments.targets().items() if "::" not in name}
ARGUMENTS = [(name, argument) for name, target in TARGETS.items() for argument in target.types]
TENSORS = [pair for pair in ARGUMENTS if fuzz_arguments.drawer_of(*pair)[0] is fuzz_arguments.TENSORS]
OPTIONS = [pair for pair in ARGUMENTS if pair not in TENSORS]
# What a class says of its arguments, it says in its own name, or in that of the function that it calls.
EVERY_NAME = "|".join(detops.__all__)
NO_TENSORS = {"a NumPy array": np.ones((2, 4), np.float32), "a list": [[1.0, 2.0, 3.0, 4.0]], "None": None}


@functools.cache
def right_call(name):
    """Arguments of a call that works: of small draws the one that has the most tensors."""

    found = []
    for seed in range(300):
        _, arguments = fuzz_arguments.draw(TARGETS[name], seed, small=True, right=True)
        tensors = {argument: fuzz.tensors_in(value) for argument, value in arguments.items()}
        if not any(sum(map(torch.Tensor.numel, each)) > 5000 for each in tensors.values()):
            found.append((sum(map(bool, tensors.values())), -seed, arguments))
        if len(found) == 20:
            break
    for *_, arguments in sorted(found, key=lambda each: each[:2], reverse=True):
        try:
            call(name, arguments)
            return arguments
        except (ValueError, TypeError, RuntimeError, OverflowError):
            continue
    raise LookupError(f"no call of {name} works")


def call(name, arguments, **changed):
    torch.manual_seed(0)
    return TARGETS[name].call(**{**arguments, **changed})


def annotation(name, argument):
    """Of the function, or of the class and its method."""
    owner, _, method = name.partition(".")
    function = getattr(detops, owner)
    for each in (function, getattr(function, method, None)) if method else (function,):
        parameter = inspect.signature(each).parameters.get(argument)
        if parameter is not None:
            return parameter.annotation, parameter.default
    raise LookupError(argument)


def may_be_none(name, argument):
    kind, default = annotation(name, argument)
    return default is None or type(None) in typing.get_args(kind)


OTHER_NAMES = {"rois": "boxes"}  # of the function that a class hands the argument to


def names(name, argument):
    """How a message about it begins; the tensors of a list are named by their place."""
    owner = name.split(".")[0]
    op = owner if "." not in name else EVERY_NAME
    return rf"^({op}): {OTHER_NAMES.get(argument, argument)}(\[\w+\])? must "


WRONG_TENSORS = [
    (name, argument, kind)
    for name, argument in TENSORS
    for kind in NO_TENSORS
    if not (kind == "None" and may_be_none(name, argument))
]


@pytest.mark.parametrize(("name", "argument", "kind"), WRONG_TENSORS, ids=lambda value: value)
def test_what_is_no_tensor_is_refused_by_name(name, argument, kind):
    arguments = right_call(name)
    with pytest.raises(RuntimeError, match=names(name, argument)) as caught:
        call(name, arguments, **{argument: NO_TENSORS[kind]})
    assert re.search(r"got (an? [\w ]+|None)$", str(caught.value))
    items = arguments[argument]
    if isinstance(items, list | dict) and items:
        first = next(iter(items)) if isinstance(items, dict) else 0
        items = items.copy()
        items[first] = NO_TENSORS[kind]
        with pytest.raises(RuntimeError, match=names(name, argument)):
            call(name, arguments, **{argument: items})


def of_numpy(value):
    """The same numbers in NumPy's types."""
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, int):
        return np.int64(value)
    if isinstance(value, float):
        return np.float64(value)
    if isinstance(value, list | tuple):
        return type(value)(map(of_numpy, value))
    return value


def as_arrays(value):
    """Numbers as 0-d tensors, sequences of numbers as arrays."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
    if isinstance(value, list | tuple) and value and all(isinstance(each, int | float) for each in value):
        return np.array(value)
    return value


@pytest.mark.parametrize(("name", "argument"), OPTIONS, ids=lambda value: value)
def test_options_take_numbers_of_numpy_and_tensors(name, argument):
    arguments = right_call(name)
    expected = fuzz.tensors_in(call(name, arguments))
    for change in (of_numpy, as_arrays):
        found = fuzz.tensors_in(call(name, arguments, **{argument: change(arguments[argument])}))
        assert len(found) == len(expected) and all(map(fuzz.same_bits, found, expected))


@pytest.mark.parametrize(("name", "argument"), OPTIONS, ids=lambda value: value)
def test_options_that_are_no_numbers_are_refused_by_name(name, argument):
    arguments, (kind, _) = right_call(name), annotation(name, argument)
    kinds = typing.get_args(kind) if isinstance(kind, UnionType) else (kind,)
    wrong = []
    if int in kinds and float not in kinds:
        wrong.append(2.5)
    if int in kinds or float in kinds:
        wrong += ["7", [[]]]
        wrong += [] if may_be_none(name, argument) else [None]
    for value in wrong:
        with pytest.raises(ValueError, match=names(name, argument)):
            call(name, arguments, **{argument: value})
