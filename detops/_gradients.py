"""Registers the gradient of an op by one rule, which reads the schemas.

The op `<name>_backward` takes, by the names of its arguments:

    grad, grad_*           the gradients of the op's results, in their order
    winners                the op's second result, which has no gradient
    the name of an input   that input: a tensor is saved, an option is kept
    <input>_wanted         whether that input wants a gradient
    sizes, channels_last   shape and memory format of the first input, or of the maps in it

and returns the gradients of the first inputs, as many as it has results.
"""

from typing import Any

import torch
from torch import Tensor

from . import _library


def register_gradient(name: str, *, linear: bool = False) -> None:
    """Registers `<name>_backward` as the gradient of an op.

    Where the op is linear in its first input, and no other wants a gradient, the gradient of the gradient is the op
    itself. Of other ops a second derivative is refused.
    """
    takes = list(_arguments(f"{name}_backward"))
    _register(name, f"{name}_backward", takes)
    if linear:
        _register(f"{name}_backward", name, ["grad", *list(_arguments(name))[1:]])
    else:
        _library.refuse_second_derivative(name)


def _arguments(name: str) -> dict[str, bool]:
    """The names of an op's arguments, and whether they are tensors or lists of tensors."""
    schema = getattr(_library.ops, name)._schema
    return {argument.name: "Tensor" in str(argument.type) for argument in schema.arguments}


def _register(name: str, gradient: str, takes: list[str]) -> None:
    """Makes the op `gradient`, called with what `takes` names, the gradient of the op `name`."""
    arguments = _arguments(name)
    places = {each: place for place, each in enumerate(arguments)}
    results = len(getattr(_library.ops, gradient)._schema.returns)
    own = [each for each in takes if each in arguments and not each.startswith("grad")]
    winners = ["winners"] if "winners" in takes else []
    saved = [each for each in own if arguments[each]] + winners
    kept = [each for each in own if not arguments[each]]

    def save(ctx: Any, inputs: tuple, output: Any) -> None:
        given = dict(zip(arguments, inputs, strict=True))
        if winners:
            given["winners"] = output[1]
            ctx.mark_non_differentiable(output[1])
        ctx.options = {each: given[each] for each in kept}
        if "sizes" in takes and "sizes" not in arguments:
            ctx.options |= _layout(inputs[0])
        parts = [given[each] if isinstance(given[each], list) else [given[each]] for each in saved]
        ctx.counts = [len(given[each]) if isinstance(given[each], list) else None for each in saved]
        ctx.save_for_backward(*(tensor for part in parts for tensor in part))

    def backward(ctx: Any, *grads: Any) -> tuple:
        tensors, coming = iter(ctx.saved_tensors), iter(grads)
        given = dict(ctx.options)
        for each, count in zip(saved, ctx.counts, strict=True):
            given[each] = next(tensors) if count is None else [next(tensors) for _ in range(count)]
        for each in takes:
            if each.startswith("grad"):
                given[each] = next(coming)
            elif each.endswith("_wanted"):
                given[each] = ctx.needs_input_grad[places[each.removesuffix("_wanted")]]
        found = getattr(_library.ops, gradient)(*(given[each] for each in takes))
        found = dict(zip(arguments, [found] if results == 1 else found, strict=False))
        return tuple(found.get(each) if given.get(f"{each}_wanted", True) else None for each in arguments)

    _library.register_autograd(name, backward, save)


def _layout(maps: Tensor | list[Tensor]) -> dict[str, Any]:
    if isinstance(maps, Tensor):
        return {"sizes": maps.shape, "channels_last": is_channels_last(maps)}
    sizes = [*maps[0].shape[:2], *(side for each in maps for side in each.shape[2:])]
    return {"sizes": sizes, "channels_last": is_channels_last(maps[0])}


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
