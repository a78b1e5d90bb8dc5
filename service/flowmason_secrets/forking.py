"""What a forked child must not share with its parent: locks that belong to an open file."""

import os

_descriptors: set[int] = set()


def close_in_children(descriptor: int) -> None:
    """Close this descriptor in every child that is forked from now on.

    A lock of `flock` belongs to the open file: a child that merely has it open would keep it,
    if the parent is killed while it holds the lock.
    """
    _descriptors.add(descriptor)


def close(descriptor: int) -> None:
    """Close a descriptor that was given to `close_in_children`."""
    _descriptors.discard(descriptor)
    os.close(descriptor)


def _in_child() -> None:
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_in_child)
