from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.documents import MAX_DEPTH, count_strings, parse_object, read_object
from app.errors import BadRequest, GatewayError

NAMES = st.text(alphabet='ab\\"\n\té\u2028/', max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | NAMES,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(NAMES, children, max_size=4),
    max_leaves=20,
)


def nested(depth: int, opening: str, closing: str) -> bytes:
    """An object that is `depth` deep, itself included."""
    return b'{"a":' + (opening * (depth - 1) + "1" + closing * (depth - 1)).encode() + b"}"


@given(st.dictionaries(NAMES, VALUES, max_size=5), st.booleans(), st.sampled_from([None, 2]))
def test_a_document_without_repetition_is_read_whatever_it_holds(
    document: dict[str, Any], is_ascii: bool, indent: int | None
) -> None:
    try:
        expected_depth = depth_of(document)
        assert read_object(json.dumps(document, ensure_ascii=is_ascii, indent=indent).encode()) == document
        assert expected_depth <= MAX_DEPTH
    except BadRequest:
        assert expected_depth > MAX_DEPTH


def depth_of(node: Any) -> int:
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else None
    return 0 if children is None else 1 + max(map(depth_of, children), default=0)


@given(st.dictionaries(NAMES, st.integers(0, 9), min_size=1, max_size=5), st.data())
def test_a_name_given_twice_is_refused_wherever_it_stands(document: dict[str, int], data: st.DataObject) -> None:
    members = [f"{json.dumps(name)}:{value}" for name, value in document.items()]
    again = data.draw(st.sampled_from(sorted(document)))
    members.insert(data.draw(st.integers(0, len(members))), f"{json.dumps(again, ensure_ascii=False)}:0")
    repeated = "{" + ",".join(members) + "}"
    for text in (repeated, f'{{"x":{repeated}}}', f'{{"x":[1,{{"y":{repeated}}}]}}'):
        with pytest.raises(BadRequest, match="twice"):
            read_object(text.encode())


def test_one_name_in_two_spellings_is_one_name() -> None:
    with pytest.raises(BadRequest, match="twice"):
        read_object(b'{"data":1,"\\u0064ata":2}')


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"b":', "}"), ('[{"b":', "}]")])
def test_depth_is_bounded_to_the_level(opening: str, closing: str) -> None:
    step = 2 if opening.startswith("[{") else 1
    deepest = 1 + (MAX_DEPTH - 1) // step
    assert read_object(nested(deepest, opening, closing))
    for depth in (deepest + 1, 100, 500):
        with pytest.raises(BadRequest, match="deep"):
            read_object(nested(depth, opening, closing))


def test_an_empty_list_counts_as_a_level() -> None:
    with pytest.raises(BadRequest, match="deep"):
        read_object(b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}")


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
def test_a_bottomless_document_is_refused(opening: bytes) -> None:
    with pytest.raises(GatewayError):
        read_object(b'{"a":' + opening * 100_000)


@pytest.mark.parametrize("filling", ["1,", "[],", "{},", '"a",', "[[]],"])
def test_a_document_of_very_many_values_is_refused_without_a_look_at_each(filling: str) -> None:
    with pytest.raises(BadRequest, match="values"):
        count_strings(json.loads("[" + filling * 11_000 + "1]"))


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "{",
            "}",
            "{]",
            '{"a"}',
            '{"a":}',
            '{"a":1,}',
            "{,}",
            '{"a":1}}',
            '{"a":1}x',
            "nul",
            "{'a':1}",
            "{a:1}",
        ),
        *('{"a":NaN}', '{"a":Infinity}', '{"a":-Infinity}', '{"a":1e999}', '{"a":-1e999}', '{"a":+1}', '{"a":01}'),
        *('{"a":.5}', '{"a":5.}', '{"a":0x1}', '{"a":1e}', '{"a":--1}', '{"a":1_0}', '{"a":\u0661}', '{"a":True}'),
        *('{"a":"\\ud800"}', '{"a":"\\udc00\\ud800"}', '{"a":"\\x41"}', '{"a":"\t"}', '{"a":"\n"}', '{"\\ud800":1}'),
        *('{"a":1}\x00', '\ufeff{"a":1}', '{"a":1}//', '/**/{"a":1}', '{"a":"\\u00"}', '{"a":"'),
    ],
)
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        read_object(text.encode())


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":"\xff"}',
        b'{"a":"\xc0\xaf"}',
        b'{"a":"\xed\xa0\x80"}',
        b'{"a":"\xf4\x90\x80\x80"}',
        b'{"\xff":1}',
        '{"a":1}'.encode("utf-16"),
        '{"a":1}'.encode("utf-32"),
    ],
)
def test_what_is_no_utf_8_is_refused(text: bytes) -> None:
    with pytest.raises(BadRequest):
        read_object(text)


@pytest.mark.parametrize("filling", [b"[],", b"{},", b"[[]],", b'[""],', b'{"a":1},', b"[1,2,3],"])
def test_a_long_text_of_little_but_lists_is_refused_unparsed(filling: bytes) -> None:
    text = b'{"a":[' + filling * (100_000 // len(filling)) + b"1]}"
    with pytest.raises(BadRequest, match="lists"):
        parse_object(text)
    assert parse_object(b'{"a":[' + filling * 10 + b"1]}")


def test_the_densest_honest_windows_are_no_such_text() -> None:
    window = [[0] * 60] * 50
    text = json.dumps({"data": [window] * 40}, separators=(",", ":")).encode()
    assert len(text) > 200_000
    assert parse_object(text) == {"data": [window] * 40}
