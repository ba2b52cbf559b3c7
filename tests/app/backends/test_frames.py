"""Frames over a real socket pair: whole through any slicing, and nothing foreign gets in."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from app.backends.coalesce import Coalescer, Group
from app.backends.frames import MAX_PAYLOAD_BYTES, Frame, FrameConnection, FrameError, Kind, Passenger, Predict
from serve_app.contract import Options

from .hand_driven import HandDrivenSend, call, drive, prediction_for, spawn


class End:
    """One end that keeps what arrives."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.arrived = asyncio.Event()
        self.closed: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.connection = FrameConnection(self._keep, self.closed.set_result)

    def _keep(self, frame: Frame) -> None:
        self.frames.append(frame)
        self.arrived.set()

    async def frame(self) -> Frame:
        await asyncio.wait_for(self.arrived.wait(), 5)
        return self.frames[0]


@asynccontextmanager
async def end_and_socket() -> AsyncIterator[tuple[End, socket.socket]]:
    """One end, and the bare socket of a peer that writes what it likes."""
    ours, theirs = socket.socketpair()
    end = End()
    await asyncio.get_running_loop().create_connection(lambda: end.connection, sock=ours)
    with theirs:
        try:
            yield end, theirs
        finally:
            end.connection.close()
            await asyncio.wait_for(asyncio.shield(end.closed), 5)


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[End, End]]:
    async with end_and_socket() as (near, theirs):
        far = End()
        await asyncio.get_running_loop().create_connection(lambda: far.connection, sock=theirs.dup())
        try:
            yield near, far
        finally:
            far.connection.close()
            await asyncio.wait_for(asyncio.shield(far.closed), 5)


def group_of(*calls_marks: tuple[float, ...]) -> Group:
    """A group as the coalescer builds it."""
    send = HandDrivenSend()

    async def scenario(loop) -> None:
        subject = Coalescer(send, max_in_flight=1, max_queued_windows=64, clock=loop.time)
        callers = [spawn(subject.predict(call(*marks))) for marks in calls_marks]
        await loop.settle()
        send.answer_all()
        await asyncio.gather(*callers)

    drive(scenario)
    return send.groups[0]


GROUP = group_of((1,), (2, 3))


async def test_a_group_arrives_with_its_passengers_and_its_windows() -> None:
    async with pair() as (near, far):
        near.connection.send_predict(9, "the_app", GROUP)
        frame = await far.frame()
        assert (frame.kind, frame.call_id) == (Kind.PREDICT, 9)
        assert Predict.of_frame(frame) == Predict(
            "the_app", Options(), 1002.0, (Passenger("r", "0" * 16, None, 1), Passenger("r", "0" * 16, None, 2))
        )
        arrived = np.frombuffer(frame.payload, "<f4").reshape(3, 50, 60)
        assert arrived[:, 0, 0].tolist() == [1, 2, 3]


def test_frames_pass_on_the_gateways_own_loop() -> None:
    uvloop.run(test_a_group_arrives_with_its_passengers_and_its_windows())


async def test_a_packed_prediction_passes_untouched() -> None:
    async with pair() as (near, far):
        packed = prediction_for(np.arange(3, dtype=np.float32)).pack()
        near.connection.send(Kind.RESULT, 4, {}, memoryview(packed))
        assert (await far.frame()).payload == packed


@settings(max_examples=50, deadline=None)
@given(
    payloads=st.lists(st.binary(max_size=200), min_size=1, max_size=5), cuts=st.lists(st.integers(1, 60), min_size=1)
)
def test_frames_survive_any_slicing(payloads: list[bytes], cuts: list[int]) -> None:
    async def scenario() -> None:
        async with end_and_socket() as (near, peer):
            for call_id, payload in enumerate(payloads):
                near.connection.send(Kind.RESULT, call_id, {"n": call_id}, memoryview(payload))
            await asyncio.sleep(0)
            stream = peer.recv(1_000_000)
            far = End()
            position = 0
            while position < len(stream):
                cut = cuts[position % len(cuts)]
                far.connection.data_received(stream[position : position + cut])
                position += cut
            expected = [Frame(Kind.RESULT, i, {"n": i}, payload) for i, payload in enumerate(payloads)]
            assert far.frames == expected

    asyncio.run(scenario())


def prefix(magic: bytes = b"sl", kind: int = 5, head: int = 2, payload: int = 0) -> bytes:
    return b"".join([magic, bytes([kind, 0]), *(n.to_bytes(4, "little") for n in (1, head, payload))])


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "no frame"),
        (prefix(kind=7) + b"{}", "no frame"),
        (prefix(kind=0) + b"{}", "no frame"),
        (prefix(payload=MAX_PAYLOAD_BYTES + 1), "larger"),
        (prefix(head=2**31), "larger"),
        (prefix() + b"{]", "not JSON"),
        (prefix() + b"[]", "not an object"),
    ],
)
async def test_a_foreign_frame_ends_the_connection(stream: bytes, reason: str) -> None:
    async with end_and_socket() as (end, peer):
        peer.sendall(stream)
        error = await asyncio.wait_for(end.closed, 5)
        assert isinstance(error, FrameError)
        assert reason in str(error)
        assert end.frames == []
        assert peer.recv(1) == b""


async def test_what_came_before_a_foreign_frame_is_still_delivered() -> None:
    async with end_and_socket() as (end, peer):
        peer.sendall(prefix() + b"{}" + b"x" * 16)
        assert isinstance(await asyncio.wait_for(end.closed, 5), FrameError)
        assert end.frames == [Frame(Kind.RESULT, 1, {}, b"")]


async def test_a_torn_frame_ends_the_connection_with_the_reason() -> None:
    async with end_and_socket() as (end, peer):
        peer.sendall(prefix(payload=10) + b"{}12345")
        peer.close()
        error = await asyncio.wait_for(end.closed, 5)
        assert isinstance(error, FrameError)
        assert "inside a frame" in str(error)


async def test_a_plain_end_of_file_is_no_error() -> None:
    async with end_and_socket() as (end, peer):
        peer.close()
        assert await asyncio.wait_for(end.closed, 5) is None
        end.connection.send(Kind.CANCEL, 1)  # dropped, not raised


@pytest.mark.parametrize("head", [{}, {"app": "a", "options": [1, 2, 3, 4], "deadline": 1, "passengers": []}])
def test_a_predict_frame_without_its_fields_is_refused(head: dict) -> None:
    with pytest.raises(FrameError, match="lacks"):
        Predict.of_frame(Frame(Kind.PREDICT, 1, head, b""))


def test_a_predict_frame_whose_windows_do_not_add_up_is_refused() -> None:
    head = {"app": "a", "options": [True, True, False], "deadline": 1.0, "passengers": [["r", "p", None, 2]]}
    with pytest.raises(FrameError, match="number of windows"):
        Predict.of_frame(Frame(Kind.PREDICT, 1, head, b"\0" * 12_000))
