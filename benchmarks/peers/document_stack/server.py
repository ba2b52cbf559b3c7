"""The design document's stack: FastAPI, one handle call per request, Ray Serve with its default settings.

The Ray is one of its own on loopback, which ends with this process however that ends.
"""

from __future__ import annotations

import argparse
import os
import signal

from app.local_ray import LocalRay
from benchmarks.peers.served import argument_parser

# Our local Ray comes with Serve settings for throughput, and the tuned stack keeps them. The document names none: these
# are Serve's defaults.
SERVE_DEFAULTS = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "0",
    "RAY_SERVE_CONTROLLER_METRICS_INCLUDE_HIGH_CARDINALITY_TAGS": "1",
    "RAY_SERVE_COMPACT_LONG_POLL_METRIC_TAGS": "0",
}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--tuned", action="store_true", help="with what Ray's documentation offers for throughput")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until uvicorn has its own, so that Ray ends too
    serve_settings = {} if arguments.tuned else SERVE_DEFAULTS
    try:
        with LocalRay(num_cpus=os.cpu_count() or 1, environment=serve_settings) as cluster:
            os.environ.update(cluster.environment)  # before ray is imported, which reads them then
            serve_until_told(arguments, cluster.address)
    except (KeyboardInterrupt, SystemExit):  # told to end, by our handler or by Ray's
        os._exit(0)  # the plain way out takes seconds, in which a driver looks for the cluster that has just ended


def serve_until_told(arguments: argparse.Namespace, ray_address: str) -> None:
    """Deploy, then answer HTTP in this process, which is the Ray driver as the document has it."""
    import ray
    import uvicorn
    from ray import serve

    from benchmarks.peers.document_stack.deployment import CNNLSTMPredictor
    from benchmarks.peers.document_stack.gateway import create_app

    ray.init(address=ray_address, ignore_reinit_error=True, log_to_driver=False)
    # Mended: Serve's own HTTP proxy would take port 8000; nothing here goes through it.
    serve.start(proxy_location="Disabled")
    deployment = CNNLSTMPredictor.bind(str(arguments.registry.resolve()), arguments.model, arguments.engine)
    # Mended: `serve.get_deployment(...).get_handle()` is gone.
    handle = serve.run(deployment, route_prefix=None)
    uvicorn.run(create_app(handle), host="127.0.0.1", port=arguments.port, access_log=False)


if __name__ == "__main__":
    main()
