"""The order in which training programs number classes that have names only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, get_args

from simprune_deploy.common.errors import DataError, InvalidArgumentError, argument, spelled

ClassOrder = Literal["timm", "torchvision"]
CLASS_ORDERS: tuple[str, ...] = get_args(ClassOrder)

SORTED_BY = {
    "timm": "timm's train.py sorts them (naturally, upper and lower case alike)",
    "torchvision": "torchvision's ImageFolder sorts them (as text)",
}

IN_THEIR_ORDER = "the model does not name its classes: the data's, in their order, are taken"


def check_class_order(order: str | None) -> None:
    """Refuse what is no order.

    Raises:
        InvalidArgumentError: it is not.
    """
    if order is not None and order not in CLASS_ORDERS:
        raise InvalidArgumentError(
            f"{argument('class_order')} {order!r} is unknown: use {' or '.join(CLASS_ORDERS)}",
            what="class_order",
            value=order,
            allowed=CLASS_ORDERS,
        )


def in_order(names: Sequence[str], order: str) -> tuple[str, ...]:
    """Return class names as a training program numbers them.

    Args:
        names: Each once.
        order: One of :data:`CLASS_ORDERS`.

    Raises:
        DataError: timm has no certain order for them.
    """
    if order == "torchvision":
        return tuple(sorted(names))
    from timm.utils.misc import natural_key

    keys = {}
    for name in names:
        try:
            keys[name] = natural_key(name)
        except ValueError:  # digits such as a raised two, on which timm stops as well
            raise DataError(
                f"timm cannot sort the class {name!r}: say which class is which with "
                f"{argument('classes', 'FILE')}"
            ) from None
    found = sorted(sorted(names), key=keys.__getitem__)
    for first, second in itertools.pairwise(found):
        # timm sorts a set, and Python's sets come in another order in every process
        if keys[first] == keys[second]:
            raise DataError(
                f"timm sorts the classes {first!r} and {second!r} as equals, in an order that "
                f"changes from run to run: say which is which with {argument('classes', 'FILE')}"
            )
    return tuple(found)


def choose_order(asked: str | None, recorded: str | None) -> tuple[str, str]:
    """Return the order to take, and in words why.

    Args:
        asked: What the user says.
        recorded: What the model says: an order, or in words what else its classes are numbered by.

    Raises:
        DataError: the model says that its classes are in neither order.
    """
    if asked is not None:
        return asked, spelled(f"as {argument('class_order')} says")
    if recorded is None:
        return "torchvision", "since nothing says what trained the model"
    if recorded not in CLASS_ORDERS:
        raise DataError(
            f"the model's classes are numbered by the {recorded:.200}, and it does not name them: "
            f"give the same list with {argument('classes', 'FILE')}, or choose with "
            f"{argument('class_order')}"
        )
    return recorded, "as the model's training checkpoint says"


def order_note(names: Sequence[str], order: str, why: str) -> str:
    """Return what was decided, and what the other order would be if it is another.

    Args:
        names: The data's classes.
        order: The order that is taken.
        why: From :func:`choose_order`.
    """
    taken = in_order(names, order)
    other = next(each for each in CLASS_ORDERS if each != order)
    try:
        rival: tuple[str, ...] = in_order(names, other)
    except DataError:
        rival = ()
    if taken == rival:
        return IN_THEIR_ORDER
    if rival:
        place = next(i for i, pair in enumerate(zip(taken, rival, strict=True)) if len({*pair}) > 1)
        differs = f"class {place} is {taken[place]!r}, and {rival[place]!r} as {SORTED_BY[other]}"
    else:
        differs = f"class 0 is {taken[0]!r}, and {other} has no certain order for them"
    return spelled(
        f"the model does not name its classes: the data's are taken as {SORTED_BY[order]}, {why}: "
        f"{differs}; choose with {argument('class_order', other)}"
    )


def check_numbers_are_plain(names: Sequence[str], num_classes: int) -> None:
    """Refuse folders named by numbers whose numbers and whose places as text are not the same.

    Args:
        names: Whole numbers in [0, num_classes), each once: all of them, or some.
        num_classes: Of the model.

    Raises:
        DataError: they are not, so that whoever trained the model must say what was meant.
    """
    widths = {len(name) for name in names}
    if len(widths) == 1 and widths.pop() >= len(str(num_classes - 1)):
        return  # zeros in front, or one digit
    whole = names if len(names) == num_classes else [str(each) for each in range(num_classes)]
    place = {name: index for index, name in enumerate(sorted(whole))}
    wrong = next((name for name in sorted(names) if place.get(name) != int(name)), None)
    if wrong is None:
        return
    found = f"number {place[wrong]}" if wrong in place else "none"
    raise DataError(
        f"the class folder {wrong!r} is the model's class {int(wrong)} by its number, and "
        f"{found} as {SORTED_BY['torchvision']}: say which with "
        f"{argument('class_order', 'timm')} (by number) or "
        f"{argument('class_order', 'torchvision')}"
    )
