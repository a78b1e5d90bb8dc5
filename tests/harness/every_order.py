"""The checker's answer once more, by trying every order against a store that does one thing after
another. Entity tags that nobody was told are tried as well. For histories of a few operations.
"""

from collections.abc import Iterator, Sequence
from itertools import permutations, product

from .linearise import Answer, Call, Operation

# The value, the version and the entity tag of a secret; an API key is there once it is revoked.
Store = dict[str, tuple[str | None, int, str]]


def ordered(history: Sequence[Operation]) -> bool:
    """Whether no operation comes after one that began when it was over."""
    return not any(
        later.precedes(earlier)
        for place, earlier in enumerate(history)
        for later in history[place + 1 :]
    )


def answers(store: Store, call: Call, tag: str) -> Answer:
    """What a store answers that does one thing at a time; `tag` is the entity tag of a write."""
    if call.key in store and call.key is not None:
        return Answer("refused")
    if call.kind == "revoke":
        if call.subject in store:
            return Answer("missing")
        store[call.subject] = (None, 0, "")
        return Answer("revoked")
    current = store.get(call.subject)
    if call.if_none_match and current is not None:
        return Answer("conflict")
    if call.if_match is not None and (current is None or call.if_match not in ("*", current[2])):
        return Answer("conflict")
    if call.kind == "set":
        version = 1 if current is None else current[1] + 1
        store[call.subject] = (call.value, version, tag)
        return Answer("created" if current is None else "updated", None, version, tag)
    if current is None:
        return Answer("missing")
    if call.kind == "delete":
        del store[call.subject]
        return Answer("deleted")
    return Answer("found", *current)


def agrees(told: Answer, right: Answer) -> bool:
    return told.outcome == right.outcome and all(
        mine in (None, theirs)
        for mine, theirs in (
            (told.value, right.value),
            (told.version, right.version),
            (told.etag, right.etag),
        )
    )


def selections(history: Sequence[Operation]) -> Iterator[list[Operation]]:
    """The history with every choice of the operations of unknown outcome that did happen."""
    sure = [one for one in history if one.answer is not None]
    unsure = [one for one in history if one.answer is None]
    for happened in product((False, True), repeat=len(unsure)):
        yield sure + [one for one, did in zip(unsure, happened, strict=True) if did]


def tags_of(operation: Operation, mentioned: set[str]) -> set[str]:
    """The entity tags that an operation may have given."""
    if operation.call.kind != "set":
        return {""}
    if operation.answer is not None and operation.answer.etag is not None:
        return {operation.answer.etag}
    return mentioned | {"nobody's"}


def explains(history: Sequence[Operation]) -> bool:
    """Whether some order does, true to the times, in which each answer is right."""
    mentioned = {one.call.if_match for one in history}
    mentioned |= {one.answer.etag for one in history if one.answer is not None}
    tags = {tag for tag in mentioned if tag is not None}
    for chosen in selections(history):
        for order in filter(ordered, permutations(chosen)):
            for given_tags in product(*(tags_of(one, tags) for one in order)):
                store: Store = {}
                if all(
                    one.answer is None or agrees(one.answer, right)
                    for one, tag in zip(order, given_tags, strict=True)
                    for right in [answers(store, one.call, tag)]
                ):
                    return True
    return False
