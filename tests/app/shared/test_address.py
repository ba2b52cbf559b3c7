from __future__ import annotations

import pytest

from app.shared.address import RedisAddress, parse_redis_url

SECRET = "canary-5b1f"


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://cache", RedisAddress("redis", "cache")),
        ("redis://cache:7000/3", RedisAddress("redis", "cache", 7000, database=3)),
        ("redis://[::1]:7000", RedisAddress("redis", "::1", 7000)),
        ("rediss://cache.example/", RedisAddress("rediss", "cache.example")),
        ("redis://:p%40ss%23@cache", RedisAddress("redis", "cache", password="p@ss#")),
        ("redis://ann:secret@10.0.0.1", RedisAddress("redis", "10.0.0.1", username="ann", password="secret")),
        ("unix:///run/redis.sock", RedisAddress("unix", path="/run/redis.sock")),
        ("unix://:pw@/run/redis.sock?db=2", RedisAddress("unix", path="/run/redis.sock", database=2, password="pw")),
    ],
)
def test_what_redis_url_may_say(url: str, address: RedisAddress) -> None:
    parsed = parse_redis_url(url)
    assert parsed == address
    assert parsed.password == address.password


@pytest.mark.parametrize(
    "url",
    [
        "",
        "cache:6379",
        f"http://:{SECRET}@cache",
        f"redis+sentinel://:{SECRET}@cache",
        f"valkey://:{SECRET}@cache",
        f"redis://:{SECRET}@",
        f"redis://:{SECRET}@cache:0",
        f"redis://:{SECRET}@cache:70000",
        f"redis://:{SECRET}@cache:port",
        f"redis://:{SECRET}@cache/db",
        f"redis://:{SECRET}@cache/-1",
        f"redis://:{SECRET}@cache/1?socket_timeout=60",
        f"redis://:{SECRET}@cache/1?password={SECRET}",
        f"redis://:{SECRET}@cache#fragment",
        f"redis://:{SECRET}#@cache",
        f"redis://:{SECRET}@ca che",
        f"redis://:{SECRET}@[::1",
        f"redis://:{SECRET}@cache\n:6379/a",
        f"unix://:{SECRET}@host/run/redis.sock",
        f"unix://:{SECRET}@/run/redis.sock?db=1&db=2",
        f"unix://:{SECRET}@/run/redis.sock?timeout=1",
        "unix://",
        "unix:///" + "x" * 107,
    ],
)
def test_anything_else_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match=r"must|takes") as caught:
        parse_redis_url(url)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_password_is_not_in_the_repr() -> None:
    assert SECRET not in repr(parse_redis_url(f"redis://ann:{SECRET}@cache"))
