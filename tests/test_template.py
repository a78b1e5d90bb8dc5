"""References in documents, without a service: what is replaced, and that nothing else is."""

import json
import re
import time
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from flowmason_secrets.core.errors import InvalidInput
from flowmason_secrets.core.keyring import Plaintext
from flowmason_secrets.core.template import MAX_DOCUMENT, MAX_RESULT, MAX_SECRETS, parse

VALUES = {"A": "1", "B": '"\\\n\u2028é😀', "NEST": "{{secrets.A}}", "a b.c-d": "s p", "": "none"}


def render(document: str, values: Mapping[str, str]) -> str:
    """The document with these values."""
    return (
        parse(Plaintext(document)).fill({name: Plaintext(v) for name, v in values.items()}).reveal()
    )


# What a string becomes. As Python writes it: one backslash here is one in the string.
STRINGS = {
    "{{secrets.A}}": "1",
    "Bearer {{secrets.A}}": "Bearer 1",
    "{{secrets.A}}{{secrets.A}}-{{secrets.B}}": "11-" + VALUES["B"],
    "{{ secrets.A }}": "1",
    "{{\t\r\nsecrets.A\n\n}}": "1",
    "{{secrets. A }}": "1",
    "{{secrets.a b.c-d}}": "s p",
    "{{secrets.NEST}}": "{{secrets.A}}",
    "{{secrets.}}": "none",
    # Others, and what only looks like one.
    "{{input.x}} {{upstream.s.y}} {{env.Z}} {{context.run}}": None,
    "{{input.secrets.A}}": None,
    "{{secrets}} {{ secrets A }} {{Secrets.A}} {{secretsA}}": None,
    "{secrets.A} {{secrets.A} {secrets.A}} {{secrets.A}": None,
    "{{secrets .A}}": None,
    "{ {secrets.A}}": None,
    "{{\xa0secrets.A}}": None,
    "{{secrets.A{B}}": None,
    "{{{secrets.A}}}": "{1}",
    "{{secrets.B {{secrets.A}}": "{{secrets.B 1",
    # Backslashes.
    "\\{{secrets.A}}": "{{secrets.A}}",
    "\\{{ secrets.A }}": "{{ secrets.A }}",
    "\\\\{{secrets.A}}": "\\1",
    "\\\\\\{{secrets.A}}": "\\{{secrets.A}}",
    "\\\\\\\\{{secrets.A}}": "\\\\1",
    "\\{{secrets.A}}\\{{secrets.A}}{{secrets.A}}": "{{secrets.A}}{{secrets.A}}1",
    "C:\\x\\\\y \\{{input.x}} \\{ \\": None,
    "{{secrets.A}}\\": "1\\",
    "": None,
}


@pytest.mark.parametrize("text", STRINGS)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_strings(text: str, ascii_only: bool) -> None:
    expected = STRINGS[text]
    document = json.dumps({"k": [text, {"l": text}]}, ensure_ascii=ascii_only)
    rendered = render(document, VALUES)
    if expected is None:
        assert rendered == document
    else:
        assert json.loads(rendered) == {"k": [expected, {"l": expected}]}


def test_escapes_of_json_are_read() -> None:
    written = (
        r'["\u007b\u007bs\u0065crets.A\u007d}", "\u005c{{secrets.A}}", "\/\u0041{{secrets.A}}"]'
    )
    assert json.loads(render(written, VALUES)) == ["1", "{{secrets.A}}", "/A1"]


@pytest.mark.parametrize(
    "written",
    [
        "1e400",
        "-0.0",
        "12345678901234567890123",
        "1" * 5000,
        " [ 1.10 ,\t1E+2,\r\n true , null ] \n",
        '{"a": 1, "a": 2, "{{secrets.A}}": 3, "{{secrets.B}}" : "x"}',
        r'"\ud800 \/ \u00e9"',
        '{"": {"": []}}',
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_reference_is_copied(written: str) -> None:
    assert render(written, VALUES) == written
    around = f'[{written}, "{{{{secrets.A}}}}", {written}]'
    assert render(around, VALUES) == f'[{written}, "1", {written}]'


def test_a_lone_surrogate_beside_a_reference_stays_an_escape() -> None:
    assert render(r'"\ud800{{secrets.A}}"', VALUES) == r'"\ud8001"'


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("NaN", "not JSON"),
        ("[-Infinity]", "not JSON"),
        ("{'a': 1}", "not JSON"),
        ("\ufeff1", "not JSON"),
        ('"\n"', "not JSON"),
        ("1 2", "not JSON"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('"' + "x" * MAX_DOCUMENT + '"', "at most 524288 bytes"),
        ('"' + "é" * (MAX_DOCUMENT // 2) + '"', "at most 524288 bytes"),
        (json.dumps([f"{{{{secrets.S{n}}}}}" for n in range(MAX_SECRETS + 1)]), "at most 100"),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_document(document: str, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason) as raised:
        parse(Plaintext(document))
    assert raised.value.field == "document"


def test_the_result_is_bounded_before_it_is_made() -> None:
    ten_thousand = json.dumps("{{secrets.A}}" * 10_000)
    assert len(render(ten_thousand, {"A": "x" * 200})) == 2_000_002
    with pytest.raises(InvalidInput, match="would have 655360002 bytes"):
        render(ten_thousand, {"A": "x" * 65536})
    # As the bytes of the answer are counted: escapes, and what UTF-8 makes of it.
    most = MAX_RESULT - 2
    for value, size in (("\x00" * 200, 1200), ("é" * 200, 400), ("\\" * 200, 400)):
        times = most // size
        text = "{{secrets.A}}" * times + "." * (most - times * size)
        assert len(render(json.dumps(text), {"A": value}).encode()) == MAX_RESULT
        with pytest.raises(InvalidInput, match="bytes with its values"):
            render(json.dumps(text + "."), {"A": value})


@pytest.mark.parametrize(
    "content",
    [
        "\\\\" * (MAX_DOCUMENT // 4) + "{ {{",
        "{{" * (MAX_DOCUMENT // 4),
        "{{secrets." * (MAX_DOCUMENT // 20),
        "{{secrets.A" * (MAX_DOCUMENT // 22),
        "{{ " + " " * (MAX_DOCUMENT // 2),
        "\\\\{{secrets.A}}" * (MAX_DOCUMENT // 40),
        '","' * (MAX_DOCUMENT // 6),
        '{{","' * (MAX_DOCUMENT // 12),
    ],
    ids=lambda text: text[:12],
)
def test_it_takes_time_in_proportion(content: str) -> None:
    """Quadratic work on what is allowed would take seconds, at least."""
    began = time.process_time()
    render(f'["{content}"]', VALUES)
    assert time.process_time() - began < 1


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="{}"), max_size=6)
SPACE = st.text(" \t\r\n", max_size=2)
PIECES = st.one_of(
    st.text(st.sampled_from('{}\\. "secrts\n\u2028é😀'), max_size=8),
    st.sampled_from(
        ["{{input.x}}", "{{", "}}", "secrets.", "\\", "{{secrets.X", "{{ env.secrets.X }}"]
    ),
    st.builds("{{{{{}secrets.{}{}}}}}".format, SPACE, st.sampled_from("ABC") | names, SPACE),
)
TEXTS = st.lists(PIECES, max_size=6).map("".join)
DOCUMENTS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


class Reference:
    """The rules once more, a character at a time, on Python's own objects."""

    def __init__(self, values: Mapping[str, str] | None) -> None:
        self.values = values
        self.names: list[str] = []

    def document(self, node: Any) -> Any:
        if isinstance(node, str):
            return self.text(node)
        if isinstance(node, list):
            return [self.document(inner) for inner in node]
        if isinstance(node, dict):
            return {key: self.document(inner) for key, inner in node.items()}
        return node

    def text(self, text: str) -> str:
        done = ""
        while text:
            slashes = len(text) - len(text.lstrip("\\"))
            name, size = self.reference(text[slashes:])
            if name is None:
                keep = max(slashes, 1)
                done, text = done + text[:keep], text[keep:]
                continue
            done += "\\" * (slashes // 2)
            written = text[slashes : slashes + size]
            done += written if slashes % 2 else self.value(name)
            text = text[slashes + size :]
        return done

    def reference(self, text: str) -> tuple[str | None, int]:
        end = text.find("}}")
        if not text.startswith("{{") or end < 0:
            return None, 0
        inside = text[2:end].lstrip(" \t\r\n")
        if not inside.startswith("secrets.") or "{" in inside or "}" in inside:
            return None, 0
        return inside.removeprefix("secrets.").strip(" \t\r\n"), end + 2

    def value(self, name: str) -> str:
        self.names.append(name)
        return "" if self.values is None else self.values[name]


@given(DOCUMENTS, st.data(), st.booleans(), st.sampled_from([None, 1]))
@hypothesis_settings(max_examples=500, deadline=None, database=None)
def test_it_does_what_a_straightforward_implementation_does(
    document: Any, data: st.DataObject, ascii_only: bool, indent: int | None
) -> None:
    written = json.dumps(document, ensure_ascii=ascii_only, indent=indent)
    looking = Reference(None)
    looking.document(document)
    template = parse(Plaintext(written))
    assert template.names == tuple(dict.fromkeys(looking.names))
    # Values that look like references, above all.
    values = {name: data.draw(TEXTS | st.text()) for name in template.names}
    rendered = template.fill({name: Plaintext(value) for name, value in values.items()}).reveal()
    assert json.loads(rendered) == Reference(values).document(document)
    assert _kinds(json.loads(rendered)) == _kinds(document)
    if not looking.names and r"\{{" not in re.sub(r"\\\\", r"\\", written):
        assert rendered == written


def _kinds(node: Any) -> Any:
    """Which types are where: 1, 1.0 and True are equal."""
    if isinstance(node, list):
        return [_kinds(inner) for inner in node]
    if isinstance(node, dict):
        return [(key, _kinds(inner)) for key, inner in node.items()]
    return type(node)


@given(st.lists(st.sampled_from(["A", "B", "C"]), min_size=1, max_size=9), st.data())
@hypothesis_settings(max_examples=100, deadline=None, database=None)
def test_nothing_is_left_and_nothing_is_expanded_twice(wanted: list[str], data: Any) -> None:
    """With values that hold no reference none is left; one in a value stays as it is."""
    plain = {name: data.draw(st.text(st.characters(exclude_characters="{"))) for name in wanted}
    document = json.dumps([f"x{{{{secrets.{name}}}}}y" for name in wanted])
    assert "{{" not in render(document, plain)
    assert parse(Plaintext(render(document, plain))).names == ()
    nested = {name: f"{{{{secrets.{name}}}}}" for name in wanted}
    once = [f"x{nested[name]}y" for name in wanted]
    assert json.loads(render(document, nested)) == once
