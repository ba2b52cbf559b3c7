"""NVIDIA Triton as the wheel nvidia-pytriton carries it: one instance of the Python backend, dynamic batching.

The wheel's own Python front (`pytriton.Triton`) is left out: it adds a hop between the server and the model.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytriton

from benchmarks.peers.served import ServedModel, argument_parser

LOOPBACK = "127.0.0.1"
ROOT = Path(__file__).parents[3]
MODELS = Path(__file__).parent / "models"
TRITON = Path(pytriton.__file__).parent / "tritonserver"


def main() -> None:
    """Become tritonserver, so that whoever started this process ends the server with it."""
    arguments = argument_parser(__doc__).parse_args()
    command = [
        str(TRITON / "bin" / "tritonserver"),
        *(f"--model-repository={MODELS}", f"--backend-directory={TRITON / 'backends'}"),
        *(f"--http-address={LOOPBACK}", f"--http-port={arguments.port}", "--allow-grpc=false"),
        *(f"--metrics-address={LOOPBACK}", f"--metrics-port={free_port()}"),
    ]
    os.chdir(ROOT)  # the interpreter inside Triton passes PYTHONPATH over, but looks for modules where it was started
    os.execve(command[0], command, environment(ServedModel.from_arguments(arguments).to_environment()))


def environment(served: dict[str, str]) -> dict[str, str]:
    """Triton finds its libraries beside the wheel, and the backend its Python as the first one of the path."""
    libraries = Path(pytriton.__file__).parents[1] / "nvidia_pytriton.libs"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, **served, "LD_LIBRARY_PATH": str(libraries), "PATH": path}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
