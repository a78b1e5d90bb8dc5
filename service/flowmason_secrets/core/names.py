"""Names: what may be called how, and which file or id follows from a name. FORMAT.md §2."""

import hashlib
import re
import unicodedata
from functools import lru_cache

from .errors import InvalidInput

CATEGORIES = ("api_key", "token", "credential", "other")

MAX_NAME = 256
MAX_DESCRIPTION = 1024
MAX_VALUE_BYTES = 65536
MAX_ORG = 256
MAX_LABEL = 128

_SURROGATE = re.compile("[\ud800-\udfff]")
_NOT_IN_NAMES = frozenset({"Cc", "Cs", "Zl", "Zp"})


def check_new_name(name: str) -> str:
    """Return `name` if a secret may be created under it.

    Stricter than `check_any_name`: what FlowMason 1.0 stored stays reachable whatever its name.

    Raises:
        InvalidInput: empty, over 256 characters, with `/` or control characters, `.` or `..`.
    """
    check_text("name", name)
    if not 1 <= len(name) <= MAX_NAME:
        raise InvalidInput("name", f"must have 1 to {MAX_NAME} characters, has {len(name)}")
    if "/" in name:
        raise InvalidInput("name", "must not contain '/'")
    # URL parsers drop the segments . and .. even when they are percent-encoded (WHATWG URL
    # §4.5), so a secret of that name could be created but never read.
    if name in (".", ".."):
        raise InvalidInput("name", "must not be '.' or '..', which URLs can't carry")
    return check_line("name", name)


def check_new_path(name: str) -> str:
    """Return `name` if a secret may be created under it by who uses `/` to order his names.

    Raises:
        InvalidInput: as `check_new_name`, for what is between two `/`; or over 256 characters.
    """
    check_text("name", name)
    if len(name) > MAX_NAME:
        raise InvalidInput("name", f"must have 1 to {MAX_NAME} characters, has {len(name)}")
    if not is_path(name):
        raise InvalidInput("name", "must not have empty segments, '.' or '..' between its '/'")
    return check_line("name", name)


def is_path(name: str) -> bool:
    """Whether `name` has no segments that URLs can't carry."""
    return all(segment not in ("", ".", "..") for segment in name.split("/"))


def check_any_name(name: str) -> str:
    """Return `name` if it can be looked up: any text that has a UTF-8 form.

    Raises:
        InvalidInput: the text holds lone surrogates.
    """
    return check_text("name", name)


def check_line(field: str, text: str) -> str:
    """Return `text` if it is one line of Unicode text.

    Raises:
        InvalidInput: control characters, line separators, lone surrogates.
    """
    check_text(field, text)
    if any(unicodedata.category(character) in _NOT_IN_NAMES for character in text):
        raise InvalidInput(field, "must not contain control characters or line separators")
    return text


def check_text(field: str, text: str) -> str:
    """Return `text` if it is text that has a UTF-8 form.

    Raises:
        InvalidInput: it is not a `str`, or holds lone surrogates.
    """
    if not isinstance(text, str):
        raise InvalidInput(field, "must be text")
    # Searched for, because an error of encoding would carry the text.
    if not text.isascii() and _SURROGATE.search(text):
        raise InvalidInput(field, "is not valid Unicode text")
    return text


def check_org(org_id: str) -> str:
    """Return `org_id` if it can be an organisation.

    Raises:
        InvalidInput: empty, over 256 characters or with control characters.
    """
    check_text("org_id", org_id)
    if not 1 <= len(org_id) <= MAX_ORG:
        raise InvalidInput("org_id", f"must have 1 to {MAX_ORG} characters, has {len(org_id)}")
    return check_line("org_id", org_id)


def check_label(name: str, field: str = "name") -> str:
    """Return `name` if an API key, a pipeline or a stage may be called so.

    Raises:
        InvalidInput: empty, over 128 characters or with control characters.
    """
    check_text(field, name)
    if not 1 <= len(name) <= MAX_LABEL:
        raise InvalidInput(field, f"must have 1 to {MAX_LABEL} characters, has {len(name)}")
    return check_line(field, name)


# Bounded: names come from callers.
@lru_cache(maxsize=4096)
def org_hash(org_id: str) -> str:
    """The directory of an organisation: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(org_id.encode()).hexdigest()[:16]


@lru_cache(maxsize=4096)
def secret_hash(name: str) -> str:
    """The stem of a secret's two files: the first 32 hex digits of its name's SHA-256."""
    return hashlib.sha256(name.encode()).hexdigest()[:32]


@lru_cache(maxsize=4096)
def secret_id(org_id: str, name: str) -> str:
    """The id of a secret, as FlowMason 1.0 made it: 16 hex digits."""
    return hashlib.sha256(f"{org_id}:{name}".encode()).hexdigest()[:16]
