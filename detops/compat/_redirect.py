"""Lets functions of another library run other code, and lets them be as they were.

The code inside a function object is exchanged and not the names that it goes by. So whoever holds the function calls
the new code: modules that imported it by any name, models and closures that keep it, default arguments, subclasses.
Every name stays bound to the object that it was bound to, and pickles by reference stay valid.
"""

import functools
import inspect
from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType
from typing import Any

# What redirected functions call, by key, and what that is made of: the replacement and the original.
targets: dict[str, Callable] = {}
_parts: dict[str, tuple[Callable, Callable]] = {}

# It runs with the globals of the other library, so it imports what it needs. Its parameters stay those of the original,
# which callers, inspect and torch.compile go by.
_SOURCE = """
def {name}({parameters}):
    from detops.compat._redirect import targets as _detops_targets

    return _detops_targets[{key!r}]({parameters})
"""


class Redirection:
    """One function of another library: `start` makes it call `replacement(original, *arguments)`, `stop` undoes that.

    Args:
        module: where the function is.
        path: its name there, or Class.method.
        replacement: gets the function as it was, and the arguments of the call.

    Raises:
        RuntimeError: something else than the library's own function is there, or it has other parameters, or some that
            are keyword-only, which this does not pass on.
    """

    def __init__(self, module: ModuleType, path: str, replacement: Callable) -> None:
        function: Any = module
        for name in path.split("."):
            function = vars(function).get(name)
        self._key = f"{module.__name__}.{path}"
        known = isinstance(function, FunctionType) and function.__module__ == module.__name__
        if not known or function.__code__.co_freevars or hasattr(function, "__wrapped__"):
            raise RuntimeError(
                f"detops.compat: {self._key} must be the function of its library, got {function!r}: "
                "something else has replaced or wrapped it"
            )
        if function.__code__.co_kwonlyargcount:
            raise RuntimeError(f"detops.compat: {self._key} must have no keyword-only parameters, got some")
        names, ours = _parameters(function.__code__), _parameters(replacement.__code__)[1:]
        if names != ours:
            raise RuntimeError(
                f"detops.compat: {self._key} must have the parameters {ours}, got {names}: "
                "this version of its library is not known to detops"
            )
        self._function, self._code = function, function.__code__
        self._replacement = replacement

    def start(self) -> None:
        function = self._function
        original = FunctionType(self._code, function.__globals__, function.__name__, function.__defaults__)
        functools.update_wrapper(original, function)
        del vars(original)["__wrapped__"]
        _parts[self._key] = self._replacement, original
        targets[self._key] = functools.partial(self._replacement, original)
        vars(function)["__wrapped__"] = original  # where TorchScript finds the source
        function.__code__ = _code_calling(self._key, self._code.co_name, *_parameters(self._code))

    def stop(self) -> None:
        """May be repeated, and follow a start that was interrupted."""
        self._function.__code__ = self._code
        vars(self._function).pop("__wrapped__", None)


def observe(make: Callable[[str, Callable, Callable], Callable]) -> None:
    """For tests and benchmarks: what is redirected now calls `make(key, replacement, original)(*arguments)`.

    That stands for `replacement(original, *arguments)`, which calls `original` for what it leaves to the other library.
    It lasts until the redirection starts anew.
    """
    for key, parts in _parts.items():
        targets[key] = make(key, *parts)


def _parameters(code: CodeType) -> list[str]:
    names = [*code.co_varnames[: code.co_argcount]]
    return names if not code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS) else [*names, "..."]


@functools.cache
def _code_calling(key: str, name: str, *parameters: str) -> CodeType:
    source = _SOURCE.format(name=name, parameters=", ".join(parameters), key=key)
    module = compile(source, f"<{key} by detops.compat>", "exec", dont_inherit=True)
    return next(constant for constant in module.co_consts if isinstance(constant, CodeType))
