"""Checks of what callers pass, worded one way: `<op>: <argument> must <rule>, got <fact>`.

Tensors: a hot function tests `isinstance(boxes, Tensor)` itself, which takes 10 ns, and calls `check_tensors` only
where that fails; one that takes over 20 us calls it at once. Options: `integer` and `number` return what the op gets.

What stands for a tensor or a number in torch's own tracing passes the checks of kind: a Proxy of torch.fx, a SymInt,
and under torch.jit.trace a 0-d tensor, which keeps a size of an image from being frozen. The dtype of a Proxy is not
known: the checks of dtypes refuse it.
"""

import operator
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

_SYMBOLS = torch.SymInt, torch.SymFloat
_LEAST, _MOST = -(2**63), 2**63 - 1

# In which there can be coordinates. torch would convert 8-bit floats, bool and complex numbers all the same.
FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
INTEGERS = frozenset((torch.int8, torch.int16, torch.int32, torch.int64))
INTEGERS |= {torch.uint8, torch.uint16, torch.uint32, torch.uint64}
REAL = FLOATING | INTEGERS


def check_tensors(op: str, **arguments: Any) -> None:
    """Raises where one is not a tensor."""
    for name, each in arguments.items():
        if not isinstance(each, Tensor) and not _stands_for_a_value(each):
            raise RuntimeError(f"{op}: {name} must be a tensor, got {kind_of(each)}")


def check_optional_tensors(op: str, **arguments: Any) -> None:
    """Raises where one is neither a tensor nor None."""
    for name, each in arguments.items():
        if each is not None and not isinstance(each, Tensor) and not _stands_for_a_value(each):
            raise RuntimeError(f"{op}: {name} must be a tensor or None, got {kind_of(each)}")


def check_floating(op: str, **tensors: Tensor) -> None:
    """Raises where one has no floating dtype that the ops take: torch has others, of 8 bits and less."""
    _check_dtypes(op, FLOATING, "float16, bfloat16, float32 or float64", tensors)


def check_same_device(op: str, first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    """Raises where two tensors lie apart."""
    if first.device != second.device:
        raise RuntimeError(
            f"{op}: {second_name} must be on the device of {first_name} ({first.device}), got {second.device}"
        )


def check_real(op: str, **tensors: Tensor) -> None:
    """Raises where one has a dtype that would be converted without sense."""
    _check_dtypes(op, REAL, "float16, bfloat16, float32, float64 or integer", tensors)


def _check_dtypes(op: str, allowed: frozenset[torch.dtype], rule: str, tensors: dict[str, Tensor]) -> None:
    for name, each in tensors.items():
        if each.dtype not in allowed:
            raise RuntimeError(f"{op}: {name} must be {rule}, got {str(each.dtype).removeprefix('torch.')}")


def promoted(op: str, first_name: str, first: Tensor, second_name: str, second: Tensor) -> torch.dtype:
    """The dtype that holds the values of both. torch has none for unsigned integers of 16 bits or more and others."""
    try:
        return torch.promote_types(first.dtype, second.dtype)
    except RuntimeError:
        one, other = (str(each.dtype).removeprefix("torch.") for each in (first, second))
        raise RuntimeError(
            f"{op}: {second_name} must have a dtype that torch promotes with that of {first_name}, {one}, got {other}"
        ) from None


def check_tensor_list(op: str, argument: str, tensors: Any) -> None:
    """Raises where it is not a list or tuple of tensors."""
    if _stands_for_a_value(tensors):
        return
    if not isinstance(tensors, list | tuple):
        raise RuntimeError(f"{op}: {argument} must be a list of tensors, got {kind_of(tensors)}")
    for place, each in enumerate(tensors):
        if not isinstance(each, Tensor) and not _stands_for_a_value(each):
            raise RuntimeError(f"{op}: {argument}[{place}] must be a tensor, got {kind_of(each)}")


def check_rows(op: str, argument: str, tensors: Any) -> None:
    """Raises where it is neither a list or tuple of tensors nor one tensor, which stands for its rows."""
    if not isinstance(tensors, Tensor):
        check_tensor_list(op, argument, tensors)
    elif tensors.ndim == 0:
        raise RuntimeError(f"{op}: {argument} must be a list of tensors, got a tensor of shape []")


def integer(op: str, argument: str, value: Any) -> int:
    """An option as an int: of NumPy's integers, 0-d tensors and all else that `operator.index` takes."""
    if type(value) is int and _LEAST <= value <= _MOST or _stands_for_a_number(value):
        return value
    try:
        found = operator.index(value)
    except TypeError:
        raise ValueError(f"{op}: {argument} must be an integer, got {_fact(value)}") from None
    if not _LEAST <= found <= _MOST:
        raise ValueError(f"{op}: {argument} must be an integer of 64 bits, got {found}")
    return found


def integers(op: str, argument: str, values: Iterable) -> tuple[int, ...]:
    """Each of a sequence, see `integer`."""
    return tuple(integer(op, argument, value) for value in sequence(op, argument, "integers", values))


def height_and_width(op: str, argument: str, sides: Iterable) -> tuple[int, int]:
    """Two integers, see `integer`."""
    found = integers(op, argument, sides)
    if len(found) != 2:
        raise ValueError(f"{op}: {argument} must be (height, width), got {found}")
    return found


def number(op: str, argument: str, value: Any) -> float:
    """An option as a float: of NumPy's numbers, 0-d tensors and all else that `float` takes, but for text. An integer
    stays one."""
    kind = type(value)
    if kind is float or kind is int and _LEAST <= value <= _MOST or _stands_for_a_number(value):
        return value
    if isinstance(value, Integral) and _LEAST <= int(value) <= _MOST:
        return int(value)
    try:
        if not isinstance(value, str | bytes | bytearray):
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # torch raises the last for more than one element
        pass
    raise ValueError(f"{op}: {argument} must be a number, got {_fact(value)}")


def numbers(op: str, argument: str, values: Iterable) -> tuple[float, ...]:
    """Each of a sequence, see `number`."""
    return tuple(number(op, argument, value) for value in sequence(op, argument, "numbers", values))


def is_one_of(value: Any, choices: Iterable[str]) -> bool:
    """Whether an option is one of these words. What cannot be hashed or compared is not."""
    return isinstance(value, str) and value in choices


def kind_of(value: Any) -> str:
    """What it is, as messages name it: "None", "a NumPy array", "a list"."""
    if value is None:
        return "None"
    name = type(value).__name__
    if name == "ndarray":
        return "a NumPy array"
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _stands_for_a_value(value: Any) -> bool:
    return hasattr(type(value), "__torch_function__") and not isinstance(value, Tensor)


def _stands_for_a_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return torch.jit.is_tracing()
    return isinstance(value, _SYMBOLS) or _stands_for_a_value(value)


def sequence(op: str, argument: str, what: str, values: Iterable) -> Sequence:
    """The elements of an iterable as a tuple; `what` names the expected elements in the message."""
    try:
        return tuple(values)
    except TypeError:
        raise ValueError(f"{op}: {argument} must be a sequence of {what}, got {_fact(values)}") from None


def _fact(value: Any) -> str:
    """A number or a text as it is written, of anything else what it is."""
    return repr(value) if isinstance(value, int | float | complex | str) else kind_of(value)
