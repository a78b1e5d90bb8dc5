"""The core: names, access, times, ids, the gate's decision, the keyring, counted failures."""

import asyncio
import hashlib
import itertools
import string
import subprocess
import sys
import time
from base64 import urlsafe_b64encode
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import get_args
from uuid import UUID

import pytest
from cryptography.fernet import Fernet
from hypothesis import given, settings
from hypothesis import strategies as st

from flowmason_secrets import app, authentication
from flowmason_secrets.authentication import Failures
from flowmason_secrets.core import access, errors, names, times
from flowmason_secrets.core.access import Principal
from flowmason_secrets.core.drafts import Draft, Precondition
from flowmason_secrets.core.errors import DecryptionFailed, InvalidInput, LogUnavailable
from flowmason_secrets.core.events import Event, Ids, Outcome
from flowmason_secrets.core.intents import Changes, Intent, admit
from flowmason_secrets.core.keyring import (
    DEFAULT_KEY,
    KeyNotHeld,
    Keyring,
    MasterKey,
    NotAuthentic,
    Plaintext,
)
from flowmason_secrets.core.names import org_hash, secret_hash, secret_id
from flowmason_secrets.core.ports import Sources
from flowmason_secrets.core.records import DropSecret, Ref, SecretRecord
from flowmason_secrets.core.status import STATUS, outcome_of
from flowmason_secrets.gate import Gate
from flowmason_secrets.storage.memory import MemoryStore

from .harness.faults import Faulty, no_space
from .harness.server import MASTER_KEY, key_ids, settings_for
from .test_stores import files_store, metadata

TEXT = st.text(st.characters(exclude_categories=["Cs"]))

# --- names ----------------------------------------------------------------------------------


def acceptable(name: str) -> bool:
    """The rule of the issue, written down naively."""
    controls = {chr(n) for n in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}
    surrogates = any(0xD800 <= ord(character) <= 0xDFFF for character in name)
    return (
        1 <= len(name) <= 256
        and "/" not in name
        and name not in (".", "..")
        and not controls & set(name)
        and not surrogates
    )


@given(
    st.one_of(
        st.text(max_size=8),
        st.text("./a\n\0\x7f\x85\u2028\u2029\u200b\ud800é\U0001f511", max_size=5),
        st.text(min_size=254, max_size=258),
    )
)
def test_a_name_is_acceptable_or_refused_by_field(name: str) -> None:
    if acceptable(name):
        assert names.check_new_name(name) == name
        # What can be created can be looked up.
        assert names.check_any_name(name) == name
    else:
        with pytest.raises(InvalidInput) as caught:
            names.check_new_name(name)
        assert caught.value.field == "name"


@given(st.text(max_size=20))
def test_any_text_that_has_bytes_can_be_looked_up(name: str) -> None:
    if any(0xD800 <= ord(character) <= 0xDFFF for character in name):
        with pytest.raises(InvalidInput):
            names.check_any_name(name)
    else:
        assert names.check_any_name(name) == name


@given(st.text(max_size=3), st.sampled_from(["check_org", "check_label"]))
def test_organisations_and_labels_have_no_control_characters(text: str, check: str) -> None:
    good = text != "" and acceptable(text.replace("/", "-").replace(".", "-"))
    if good:
        assert getattr(names, check)(text) == text
    else:
        with pytest.raises(InvalidInput):
            getattr(names, check)(text)


@given(TEXT, TEXT)
def test_files_and_ids_are_those_of_flowmason_1(org: str, name: str) -> None:
    assert org_hash(org) == hashlib.sha256(org.encode()).hexdigest()[:16]
    assert secret_hash(name) == hashlib.sha256(name.encode()).hexdigest()[:32]
    assert secret_id(org, name) == hashlib.sha256(f"{org}:{name}".encode()).hexdigest()[:16]


# --- access ---------------------------------------------------------------------------------


def matches(pattern: str, name: str) -> bool:
    """`*` and `?` by dynamic programming: slow, but plainly right."""
    reached = {0}
    for token in pattern:
        if token == "*":
            reached = set(range(min(reached), len(name) + 1)) if reached else set()
        else:
            reached = {at + 1 for at in reached if at < len(name) and token in ("?", name[at])}
    return len(name) in reached


def principal(*allow: str, scopes: frozenset[str] = access.ANY) -> Principal:
    return Principal("acme", "key_1", "api_key", scopes, allow)


SMALL = st.text("ab*?.\n[]\\^$|(){}+é", max_size=7)


@settings(max_examples=600)
@given(st.lists(SMALL.filter(bool), min_size=1, max_size=4), st.text("ab*?.\n[]\\é", max_size=7))
def test_allowed_names_are_those_that_a_naive_matcher_allows(allow: list[str], name: str) -> None:
    wanted = any(matches(pattern, name) for pattern in allow)
    assert principal(*allow).may_name(name) == wanted
    if not wanted:
        with pytest.raises(errors.Denied):
            principal(*allow).require_name(name)


@settings(max_examples=300)
@given(TEXT, TEXT)
def test_text_is_no_pattern_but_for_its_wildcards(pattern: str, name: str) -> None:
    if pattern:
        assert principal(pattern).may_name(name) == matches(pattern, name)
        assert principal(pattern).may_name(pattern)
    assert principal().may_name(name)


def test_no_pattern_takes_long_to_match() -> None:
    """In a process of its own, because nothing interrupts a regular expression.

    Whoever may make API keys must not be able to stop the service for everybody.
    """
    code = """
import time
from flowmason_secrets.core.access import ANY, Principal, check_patterns
for pattern in ("*a" * 127 + "b", "*a?" * 60 + "b*c", "?*" * 128, "*" * 255 + "b",
                "a*" * 100 + "b", "*" + "a*b" * 60 + "c"):
    for name in ("a" * 256, "ab" * 128, "a" * 255 + "b", "b" * 256):
        began = time.perf_counter()
        allow = check_patterns([pattern[:256]])
        Principal("o", "k", "api_key", ANY, allow).may_name(name)
        assert time.perf_counter() - began < 0.5, pattern
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=20, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-500:]


@given(st.sets(st.sampled_from(access.SCOPES)), st.sets(st.sampled_from(access.SCOPES)))
def test_one_of_the_scopes_is_needed(held: set[str], needed: set[str]) -> None:
    who = principal(scopes=frozenset(held))
    if held & needed:
        who.require(needed)
    else:
        with pytest.raises(errors.Denied):
            who.require(needed)


@given(st.lists(st.sampled_from([*access.SCOPES, "admin", "", "FULL"]), max_size=5))
def test_scopes_are_known_ones_each_once(scopes: list[str]) -> None:
    if scopes and set(scopes) <= set(access.SCOPES):
        checked = access.check_scopes(scopes)
        assert set(checked) == set(scopes)
        assert len(checked) == len(set(checked))
    else:
        with pytest.raises(InvalidInput):
            access.check_scopes(scopes)


# --- times ----------------------------------------------------------------------------------

MOMENTS = st.datetimes(
    datetime(1, 1, 2),  # noqa: DTZ001 - hypothesis adds the zone
    datetime(9999, 12, 30),  # noqa: DTZ001
    timezones=st.just(UTC),
    allow_imaginary=False,
)


@given(MOMENTS)
def test_a_time_is_rendered_and_parsed_to_the_same(moment: datetime) -> None:
    seconds = (moment - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(seconds=1)
    text = times.render(seconds)
    assert len(text) == 27
    assert text.endswith("Z")
    parsed = times.parse(text, "expires_at")
    assert times.render(parsed) == text
    # As near as floats are, two thousand years from their origin.
    assert abs(parsed - seconds) < 1e-4
    assert times.parse_stored(text) == parsed
    near = datetime.fromisoformat(text)
    assert abs(near - moment) <= timedelta(microseconds=20)


@given(MOMENTS, st.integers(-23 * 60 - 59, 23 * 60 + 59))
def test_zones_are_taken_into_account(moment: datetime, minutes: int) -> None:
    moment = moment.replace(microsecond=0)
    sign, rest = "-" if minutes < 0 else "+", abs(minutes)
    local = (moment.replace(tzinfo=None)).isoformat()
    text = f"{local}{sign}{rest // 60:02}:{rest % 60:02}"
    wanted = (moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() - minutes * 60
    found = times.parse(text, "expires_at")
    # What lies beyond the ends of time counts as these ends.
    assert found == min(max(wanted, -62135596800.0), 253402300799.0)
    assert times.parse(text.replace("T", "t"), "expires_at") == found
    times.render(found)


@given(
    st.one_of(
        st.text(max_size=30),
        st.from_regex(r"\d{4}-\d{2}-\d{2}[Tt ]?\d{2}:\d{2}(:\d{2})?(\.\d+)?[Zz+-]?.{0,6}"),
    )
)
def test_anything_else_is_refused_by_field(text: str) -> None:
    try:
        found = times.parse(text, "expires_at")
    except InvalidInput as error:
        refused = error.field
        assert refused == "expires_at"
    else:
        # It is a time with a zone, and the standard library agrees on which.
        moment = datetime.fromisoformat(text.upper())
        assert moment.tzinfo is not None
        assert abs(found - (moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()) < 86400


@pytest.mark.parametrize(
    "text",
    [
        *("", "2026-01-31", "2026-01-31T12:00:00", "2026-01-31T12:00Z", "20260131T120000Z"),
        *("2026-02-30T12:00:00Z", "2026-01-31T25:00:00Z", "2026-01-31T12:00:00+24:00"),
        *("2026-01-31T12:00:00Z\n", " 2026-01-31T12:00:00Z", "٢٠٢٦-01-31T12:00:00Z"),
        *("2026-W05-6T12:00:00Z", "0000-01-01T00:00:00Z", "2026-01-31T12:00:00 Z", "never"),
    ],
)
def test_what_is_not_a_time_with_a_zone(text: str) -> None:
    with pytest.raises(InvalidInput):
        times.parse(text, "expires_at")


# --- ids ------------------------------------------------------------------------------------


def test_ids_are_uuids_of_version_7() -> None:
    moment = [1_700_000_000.123]
    ids = Ids(lambda: moment[0], Random(1).randbytes)
    seen: set[str] = set()
    random_bits = 0
    all_set = (1 << 128) - 1
    for number in range(20_000):
        moment[0] = 1_700_000_000.123 + number // 100
        text = ids()
        found = UUID(text)
        assert str(found) == text
        assert (found.version, found.variant) == (7, "specified in RFC 4122")
        assert found.int >> 80 == int(moment[0] * 1000)
        seen.add(text)
        random_bits |= found.int
        all_set &= found.int
    assert len(seen) == 20_000
    # All of the 74 bits that may be random are (RFC 9562 §5.7).
    mask = (1 << 80) - 1
    assert random_bits & mask == mask & ~(0x8 << 76) & ~(0x4 << 60)
    assert all_set & mask == 0x7 << 76 | 0x8 << 60


def test_ids_of_several_threads_are_unique() -> None:
    ids = Ids(time.time, Random(2).randbytes)

    async def work() -> list[str]:
        def some() -> list[str]:
            return [ids() for _ in range(20_000)]

        found = await asyncio.gather(*(asyncio.to_thread(some) for _ in range(2)))
        return [one for part in found for one in part]

    # One event loop uses it, and the commit thread for the headers of segments.
    found = asyncio.run(work())
    assert len(set(found)) >= len(found) - 1


# --- the gate's decision --------------------------------------------------------------------

REFS: list[Ref] = [("acme", letter) for letter in "abc"]


def intent(kind: str, ref: Ref, depends: tuple[tuple[Ref, int], ...]) -> Intent:
    about = Event("id", f"secret.{kind}", "success", ref[0], "secret", ref[1])
    if kind == "barrier":
        return Intent(None, depends)
    if kind == "reads":
        return Intent(about, depends, more=(about._replace(id="2"), about._replace(id="3")))
    return Intent(about, depends, DropSecret("acme", ref[1]) if kind == "delete" else None)


INTENTS = st.builds(
    intent,
    st.sampled_from(["read", "reads", "delete", "barrier"]),
    st.sampled_from(REFS),
    st.lists(st.tuples(st.sampled_from(REFS), st.integers(0, 30)), max_size=3, unique=True).map(
        tuple
    ),
)


class Naive:
    """Every change that ever was, in order; nothing is forgotten."""

    def __init__(self) -> None:
        self.history: list[Ref | None] = []

    def admit(self, batch: list[Intent]) -> tuple[list[int], list[int], list[int]]:
        events: list[int] = []
        current: list[int] = []
        stale: list[int] = []
        order = [index for index, one in enumerate(batch) if one.change is None]
        order += [index for index, one in enumerate(batch) if one.change is not None]
        for index in order:
            one = batch[index]
            if any(ref in self.history[as_of:] for ref, as_of in one.depends):
                stale.append(index)
            elif one.event is None:
                current.append(index)
            else:
                for _ in (one.event, *one.more):
                    self.history.append(None if one.change is None else one.event.changed[0])
                    events.append(index)
        return events, current, stale


@settings(max_examples=400)
@given(st.lists(st.lists(INTENTS, max_size=6), max_size=8))
def test_admission_is_that_of_a_naive_model(batches: list[list[Intent]]) -> None:
    naive, changes = Naive(), Changes(0)
    for batch in batches:
        position = len(naive.history)
        wanted = naive.admit(batch)
        found = admit(batch, changes, position)
        assert ([index for index, _ in found.events], found.current, found.stale) == wanted
        together = itertools.groupby(found.events, lambda admitted: admitted[0])
        assert [(index, [event for _, event in group]) for index, group in together] == [
            (index, [batch[index].event, *batch[index].more]) for index in dict.fromkeys(wanted[0])
        ]


@settings(max_examples=400)
@given(
    st.lists(st.lists(INTENTS, max_size=6), max_size=12),
    st.integers(1, 3),
    st.integers(0, 10),
)
def test_a_bounded_memory_errs_on_the_safe_side(
    batches: list[list[Intent]], limit: int, start: int
) -> None:
    """Whatever has been forgotten: what the naive model calls stale is never admitted."""
    naive, changes = Naive(), Changes(start, limit)
    naive.history = [REFS[0]] * start
    for batch in batches:
        position = len(naive.history)
        found = admit(batch, changes, position)
        for index, one in enumerate(batch):
            if any(ref in naive.history[as_of:position] for ref, as_of in one.depends):
                assert index in found.stale
        # Who read the newest there is is not turned away, unless by a change of this batch.
        for index in found.stale:
            if all(as_of >= position for _, as_of in batch[index].depends):
                assert batch[index].change is not None or not batch[index].depends
        admitted = list(dict.fromkeys(index for index, _ in found.events))
        assert sorted(admitted + found.current + found.stale) == list(range(len(batch)))
        for index, event in found.events:
            naive.history.append(None if batch[index].change is None else event.changed[0])
        assert len(changes._last) <= limit


# --- the keyring ----------------------------------------------------------------------------

ONE, TWO = MasterKey.of("the first master key"), MasterKey.of("the second master key")


def fernet_of_10(org: str, master_key: str | None) -> Fernet:
    """FlowMason 1.0's derivation, by the standard library alone."""
    if master_key is None:
        master_key = hashlib.sha256(f"flowmason-default-key-{org}".encode()).hexdigest()[:32]
    salt = hashlib.sha256(org.encode()).digest()
    key = hashlib.pbkdf2_hmac("sha256", master_key.encode(), salt, 100_000, 32)
    return Fernet(urlsafe_b64encode(key))


@settings(max_examples=6, deadline=None)
@given(
    org=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
    key=st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]), min_size=1)),
    value=TEXT,
)
def test_the_derivation_is_that_of_flowmason_1(org: str, key: str | None, value: str) -> None:
    master = DEFAULT_KEY if key is None else MasterKey.of(key)
    ring = Keyring([master])
    assert not ring.derived(org, master.key_id)
    ring.derive(org, master.key_id)
    theirs = fernet_of_10(org, key)
    token = theirs.encrypt(value.encode())
    assert ring.decrypt(org, master.key_id, token).reveal() == value
    assert theirs.decrypt(ring.encrypt(org, Plaintext(value))).decode() == value


def test_a_key_is_named_by_a_slow_hash_and_shown_nowhere() -> None:
    named = hashlib.pbkdf2_hmac(
        "sha256", b"the first master key", b"flowmason-secrets key id", 100_000, 4
    )
    assert ONE.key_id == named.hex()
    assert MasterKey.of("the first master key") == ONE
    assert ONE.key_id != TWO.key_id
    ring = Keyring([ONE, TWO])
    assert "master key" not in f"{ONE!r} {ring!r} {vars(ring)!r}"
    assert (ring.active, ring.oldest, ring.held) == (
        ONE.key_id,
        TWO.key_id,
        (ONE.key_id, TWO.key_id),
    )
    with pytest.raises(ValueError, match="at least one"):
        Keyring([])


def test_nothing_is_decrypted_by_trial() -> None:
    old, new, both = Keyring([TWO]), Keyring([ONE]), Keyring([ONE, TWO])
    for ring in (old, new, both):
        for key_id in ring.held:
            ring.derive("acme", key_id)
    token = old.encrypt("acme", Plaintext("value"))
    assert both.decrypt("acme", TWO.key_id, token).reveal() == "value"
    # Both keys are held and derived; the one that is named is not the right one.
    with pytest.raises(NotAuthentic):
        both.decrypt("acme", ONE.key_id, token)
    with pytest.raises(KeyNotHeld):
        new.decrypt("acme", TWO.key_id, token)
    with pytest.raises(KeyNotHeld):
        both.decrypt("acme", "00000000", token)
    # Nor with the key of another organisation.
    both.derive("globex", TWO.key_id)
    with pytest.raises(NotAuthentic):
        both.decrypt("globex", TWO.key_id, token)
    swapped = token[:20] + (b"B" if token[20:21] == b"A" else b"A") + token[21:]
    for damaged in (token[:-1], b"", b"gAAAA", swapped):
        with pytest.raises(NotAuthentic):
            both.decrypt("acme", TWO.key_id, damaged)


async def test_a_secret_is_read_with_the_key_that_it_names_only(data_dir: Path) -> None:
    caller = app.local_caller("acme")
    service = await app.open_service(settings_for(data_dir))
    await service.set(caller, Draft("TOKEN", Plaintext("value")))
    await service.close()
    (meta,) = data_dir.glob("*/*.meta")
    held = key_ids(MASTER_KEY, "another master key")
    text = meta.read_text()
    assert held[0] in text
    meta.write_text(text.replace(held[0], held[1]))
    keys = (MASTER_KEY, "another master key")
    service = await app.open_service(app.with_overrides(settings_for(data_dir), master_keys=keys))
    before = {path: path.read_bytes() for path in data_dir.glob("*/*.*")}
    with pytest.raises(DecryptionFailed) as caught:
        await service.get(caller, "TOKEN")
    assert (caught.value.key_id, caught.value.held) == (held[1], held)
    assert "value" not in str(caught.value).replace("can't be decrypted", "")
    after = {path: path.read_bytes() for path in before if path.suffix in (".meta", ".secret")}
    assert after == {path: before[path] for path in after}
    meta.write_text(text)
    service_again = await app.open_service(
        app.with_overrides(settings_for(data_dir), master_keys=keys[::-1])
    )
    assert (await service_again.get(caller, "TOKEN")).value.reveal() == "value"
    await service.close()
    await service_again.close()


@given(st.text(string.ascii_letters, min_size=4, max_size=40).map("canary".__add__))
def test_a_plaintext_shows_its_length_and_nothing_else(value: str) -> None:
    plaintext = Plaintext(value)
    for text in (
        repr(plaintext),
        str(plaintext),
        f"{plaintext}",
        f"{[plaintext]}",
        "%s" % plaintext,  # noqa: UP031 - one more way to show it
    ):
        assert value not in text
        assert str(len(value)) in text
    assert plaintext.reveal() == value
    draft = Draft("TOKEN", plaintext)
    assert value not in f"{draft!r} {draft}"
    with pytest.raises(AttributeError):
        plaintext.other = value  # type: ignore[attr-defined] # there is no place for it
    assert not hasattr(plaintext, "__dict__")


# --- conditional writes, errors -------------------------------------------------------------


def test_an_entity_tag_is_of_one_content() -> None:
    ids = Ids(time.time, Random(4).randbytes)
    records = [SecretRecord(metadata("A", 1 + n % 3, ids()), b"", 0) for n in range(300)]
    assert len({record.metadata.etag for record in records}) == 300
    for record in records[:3]:
        etag = record.metadata.etag
        Precondition(etags=(etag,)).check("A", record)
        Precondition(etags=('"x"', etag)).check("A", record)
        Precondition(etags=("*",)).check("A", record)
        Precondition(absent=True).check("A", None)
        for wrong in (Precondition(absent=True), Precondition(etags=('"0-0"',))):
            with pytest.raises(errors.PreconditionFailed) as caught:
                wrong.check("A", record)
            assert caught.value.current == etag
        for wrong in (Precondition(etags=("*",)), Precondition(etags=(etag,))):
            with pytest.raises(errors.PreconditionFailed) as caught:
                wrong.check("A", None)
            assert caught.value.current is None


def all_errors(
    kind: type[errors.SecretsError] = errors.SecretsError,
) -> list[type[errors.SecretsError]]:
    found = [
        sub for sub in kind.__subclasses__() if sub.__module__.startswith("flowmason_secrets.core")
    ]
    return found + [deeper for sub in found for deeper in all_errors(sub)]


def test_every_error_has_its_row_and_its_own_code() -> None:
    kinds = all_errors()
    assert len(kinds) > 12
    assert set(kinds) == set(STATUS)
    assert len({kind.code for kind in kinds}) == len(kinds)
    for kind in kinds:
        assert outcome_of(kind.__new__(kind)) in get_args(Outcome)
        assert outcome_of(kind.__new__(kind)) != "success"


# --- failures of those who have no key ------------------------------------------------------


class Log:
    """A gate over a memory store, and what it has written."""

    def __init__(self) -> None:
        self._store = MemoryStore(Sources(time.time, ids := Ids(time.time, Random(5).randbytes)))
        self.failures = Failures(Gate(self._store), ids)

    def counts(self) -> dict[str | None, int]:
        from flowmason_secrets.storage.wire import decode_line

        found: dict[str | None, int] = {}
        for chunk in self._store.chunks(1, self._store.position):
            line = decode_line(chunk.data)
            assert (line["action"], line["outcome"]) == ("auth.failed", "denied")
            assert (line["org_id"], line["actor"], line["status"]) == (None, None, 401)
            count = line["details"]["count"]
            assert isinstance(count, int)
            found[line["client_ip"]] = found.get(line["client_ip"], 0) + count
        return found

    @property
    def written(self) -> int:
        return self._store.position - 1


async def test_failures_are_one_event_for_each_address() -> None:
    log = Log()
    for number in range(5000):
        log.failures.note(f"10.0.0.{number % 7}")
    assert log.written == 0
    await log.failures.flush()
    assert log.written == 7
    assert sum(log.counts().values()) == 5000
    assert log.counts()["10.0.0.0"] == 715
    # Nothing is written twice, and nothing without a failure.
    await log.failures.flush()
    assert log.written == 7
    log.failures.note(None)
    await log.failures.close()
    assert (log.written, log.counts()[None]) == (8, 1)


async def test_failures_from_many_addresses_are_bounded() -> None:
    log = Log()
    for number in range(50_000):
        log.failures.note(f"2001:db8::{number:x}")
    assert len(log.failures._counts) <= authentication.COUNTED_ADDRESSES + 1
    await log.failures.close()
    assert log.written <= authentication.COUNTED_ADDRESSES + 1
    counts = log.counts()
    assert sum(counts.values()) == 50_000
    assert counts[None] == 50_000 - authentication.COUNTED_ADDRESSES


async def test_failures_are_written_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authentication, "FLUSH_SECONDS", 0.02)
    log = Log()
    for round_number in range(3):
        for _ in range(10):
            log.failures.note("10.0.0.1")
        async with asyncio.timeout(5):
            while log.written <= round_number:
                await asyncio.sleep(0.005)
    assert log.counts() == {"10.0.0.1": 30}
    assert log.written == 3
    await log.failures.close()


async def test_failures_that_could_not_be_written_are_kept(tmp_path: Path) -> None:
    disk = Faulty({"write"}, no_space)
    store = files_store(tmp_path, disk)
    failures = Failures(Gate(store), Ids(time.time, Random(6).randbytes))
    for number in range(3):
        failures.note(f"10.0.0.{number}")
    disk.broken = True
    with pytest.raises(LogUnavailable):
        await failures.flush()
    failures.note("10.0.0.1")
    disk.broken = False
    await failures.close()
    # One of them, two of the other; not twice what was written at last.
    (segment,) = (tmp_path / "events").iterdir()
    data = segment.read_bytes()
    assert data.count(b"auth.failed") == 3
    assert data.count(b'"count":2') == 1
    await store.close()
