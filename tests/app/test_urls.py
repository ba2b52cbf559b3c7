from __future__ import annotations

import pytest

from app.urls import check_key_url, check_origin, is_host


@pytest.mark.parametrize(
    "host",
    [
        *("issuer.example", "localhost", "a", "x1", "1.example", "my_service", "a-b.c-d", "a" * 63 + ".example"),
        *("127.0.0.1", "255.255.255.255", "::1", "fd00::1", "::ffff:10.0.0.1"),
    ],
)
def test_names_and_addresses_are_hosts(host: str) -> None:
    assert is_host(host)


@pytest.mark.parametrize(
    "host",
    [
        *("1.2.3.999", "1.2.3", "1.2.3.4.5", "999", "127.1", "0x7f.1", "a.0x7f000001", "issuer.1", "01.02.03.04"),
        *(
            "",
            ".",
            "a..b",
            ".a",
            "a.",
            "-a",
            "a-",
            "a.-b",
            "a" * 64,
            ".".join(["a" * 60] * 5),
            "A.example",
            "ä.example",
        ),
        *("ä.example", ":", ":::", "1:2", "::1::", "fe80::1%eth0", "a:b", "a b", "a/b", "a\n"),
    ],
)
def test_what_can_be_neither_name_nor_address_is_no_host(host: str) -> None:
    assert not is_host(host)


@pytest.mark.parametrize("check", [check_origin, check_key_url])
@pytest.mark.parametrize("host", ["1.2.3.999", "a..b", "-a.example", "[::1::]", "[fe80::1%25eth0]", ""])
def test_an_url_must_name_a_possible_host(check: type, host: str) -> None:
    with pytest.raises(ValueError, match=r"host|URL"):
        check(f"https://{host}/")
