"""BentoML: one worker whose adaptive batching joins the windows of waiting requests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.peers.served import ServedModel, argument_parser


def main() -> None:
    """Become `bentoml serve`, so that whoever started this process ends the server with it."""
    arguments = argument_parser(__doc__).parse_args()
    command = [
        *(
            sys.executable,
            "-m",
            "bentoml",
            "serve",
            "service:Predictor",
            "--host",
            "127.0.0.1",
            "--port",
            str(arguments.port),
        ),
        *("--working-dir", str(Path(__file__).parent)),
    ]
    os.execve(
        command[0],
        command,
        {**os.environ, **ServedModel.from_arguments(arguments).to_environment(), "BENTOML_DO_NOT_TRACK": "true"},
    )


if __name__ == "__main__":
    main()
