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
    lists = [str(each.type) == "List[Tensor]" for each in getattr(_library.ops, name)._schema.arguments]
    results = len(getattr(_library.ops, gradient)._schema.returns)
    grads = [each for each in takes if each.startswith("grad")]
    own = [each for each in takes if each in arguments and each not in grads]
    kept = [each for each in own if not arguments[each]]
    layout = [each for each in ("sizes", "channels_last") if each in takes and each not in arguments]
    flags = [each for each in takes if each.endswith("_wanted")]
    saved = [each for each in own if arguments[each] and not lists[places[each]]]
    listed = [each for each in own if lists[places[each]]]  # one at most: it is saved last
    winners = ["winners"] if "winners" in takes else []
    # All is found out here once, since small tensors would feel it in each call.
    come = [*grads, *kept, *layout, *flags, *saved, *winners, *listed]
    order = [come.index(each) for each in takes]
    kept_places, saved_places, list_places = ([places[each] for each in of] for of in (kept, saved, listed))
    flag_places = [places[each.removesuffix("_wanted")] for each in flags]
    unwanted = [(place, flag_places.index(place)) for place in range(results) if place in flag_places]
    others = (None,) * (len(arguments) - results)

    def save(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.options = [inputs[place] for place in kept_places]
        if layout:
            ctx.options += _layout(inputs[0])
        tensors = [inputs[place] for place in saved_places]
        if winners:
            ctx.mark_non_differentiable(output[1])
            tensors.append(output[1])
        for place in list_places:
            tensors += inputs[place]
        ctx.save_for_backward(*tensors)

    def backward(ctx: Any, *coming: Any) -> tuple:
        tensors, alone = ctx.saved_tensors, len(saved) + len(winners)
        wanted = [ctx.needs_input_grad[place] for place in flag_places]
        values = [*coming[: len(grads)], *ctx.options, *wanted, *tensors[:alone]]
        if listed:
            values.append(list(tensors[alone:]))
        found = getattr(_library.ops, gradient)(*[values[place] for place in order])
        found = [found] if results == 1 else list(found)
        for place, flag in unwanted:
            if not wanted[flag]:
                found[place] = None
        return *found, *others

    _library.register_autograd(name, backward, save)


def _layout(maps: Tensor | list[Tensor]) -> list[Any]:
    """The sizes and whether the format is channels_last."""
    if isinstance(maps, Tensor):
        return [maps.shape, is_channels_last(maps)]
    return [[*maps[0].shape[:2], *(side for each in maps for side in each.shape[2:])], is_channels_last(maps[0])]


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
