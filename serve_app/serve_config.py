"""The Serve configuration, built from few typed settings: the body of the REST PUT and the YAML of `serve deploy`.

Serve ignores keys that it does not know, so nothing is passed through: what is not a field here is refused.
Changing what a replica serves (`ServedModel`) happens in place; changing how it queues (`QueueLimits`) or its size
restarts replicas one after another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve_app.autoscaling import PROFILES, ProfileName
from serve_app.contract import APP_NAME, MODEL_NAME
from serve_app.resources import SIZES, SizeName

DEPLOYMENT_NAME = "CNNLSTMPredictor"
IMPORT_PATH = "serve_app.deployment:build"

MAX_BATCH_WINDOWS = 32

# Calls that Serve may hand to one replica at a time. The replica bounds its queue in windows and the gateway bounds
# what it sends, so this is only kept from being the bottleneck: full replicas are polled, which costs latency.
MAX_ONGOING_REQUESTS = 512

# Longer than any deadline of the gateway, so that a replica that is replaced answers what it has taken.
GRACEFUL_SHUTDOWN_TIMEOUT_S = 10.0
GRACEFUL_SHUTDOWN_WAIT_LOOP_S = 0.5

# Three checks in a row must fail: a stopped process is found within 3 × (1 + 2) s, and a new one needs a few more.
HEALTH_CHECK_PERIOD_S = 1.0
HEALTH_CHECK_TIMEOUT_S = 2.0

# Serve reads these once, when it is imported: cluster and bridge process must start with the same ones.
SERVE_ENV: dict[str, str] = {
    # gRPC between handle and replica, the router in the caller's loop, buffered request logs.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # Of that bundle, not this one: nothing shall listen for strangers. What it does include is that replicas run our
    # code on their main loop, which spares two changes of thread; forward passes that take long have their own thread.
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    # A process that hangs cannot shut down gracefully; waiting for it delays the one that replaces it.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # Series per replica and per handle would grow with every restart.
    "RAY_SERVE_CONTROLLER_METRICS_INCLUDE_HIGH_CARDINALITY_TAGS": "0",
    "RAY_SERVE_COMPACT_LONG_POLL_METRIC_TAGS": "1",
}

Device = Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")]
EngineName = Literal["auto", "torch", "onnxruntime", "openvino", "openvino-bf16", "noop", "sleep", "faulty"]
FAULT_ENGINE = "faulty"  # fails as it is told
STUB_ENGINES = ("noop", "sleep", FAULT_ENGINE)  # they answer a constant


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ServedModel(_Strict):
    """What a replica serves; the deployment's `user_config`, so that a change happens in place.

    Attributes:
        registry_path: Root of the model registry on the replicas' nodes.
        model: Name in the registry.
        standby: Version that a starting replica serves where it has to refuse `version`.
        version: Version or alias. An alias is resolved when a replica loads it: pin a version for a rollout.
        engine: Name in the table of engines.
        device: `cpu`, `cuda` or `cuda:N`.
        threads: Threads of one forward pass.
        registry_key_path: Public key on the replicas' nodes; where given, only versions signed with it are served.
        exact: Answers whose bits do not depend on batch mates, at a price.
        gpu_share: Share of a GPU that bounds the memory taken there; `ServedApplication` fills in its size's.
        fault_file: On the replicas' nodes, what the engine `faulty` is told by.
    """

    registry_path: str = "models/"
    model: str = MODEL_NAME
    version: str = "latest"
    standby: str | None = None
    engine: EngineName = "torch"
    device: Device = "cpu"
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    registry_key_path: str | None = None
    exact: bool = False
    gpu_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    fault_file: str | None = None


class QueueLimits(_Strict):
    """How a replica queues; the arguments of the deployment.

    Attributes:
        max_batch_windows: Most windows of one forward pass.
        max_queue_windows: Windows that may wait; beyond them calls are shed with `Overloaded`.
        inline_windows: Batches up to this size run on the replica's event loop, larger ones on a thread.
        stall_s: Seconds without progress while work waits, after which the replica calls itself unhealthy.
    """

    max_batch_windows: Annotated[int, Field(ge=1, le=1024)] = MAX_BATCH_WINDOWS
    max_queue_windows: Annotated[int, Field(ge=1, le=65536)] = 16 * MAX_BATCH_WINDOWS
    inline_windows: Annotated[int, Field(ge=0, le=64)] = 4
    stall_s: Annotated[float, Field(gt=0, le=300)] = 5.0


class ServedApplication(_Strict):
    """One Serve application: a model version with its size and scaling profile.

    Attributes:
        name: Application name; a candidate version gets `cnn_lstm_predictor-VERSION`.
        profile: Scaling profile, see `serve_app.autoscaling.PROFILES`.
        size: Replica size, see `serve_app.resources.SIZES`.
        serves: What its replicas serve.
        queue: How they queue.
        env_vars: Variables of the replicas' processes.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][A-Za-z0-9_.-]{0,95}$")] = APP_NAME
    profile: ProfileName = "local"
    size: SizeName = "local"
    serves: ServedModel = ServedModel()
    queue: QueueLimits = QueueLimits()
    env_vars: dict[str, str] = {}

    def application(self) -> dict[str, Any]:
        """This application as Serve's schema has it."""
        return {
            "name": self.name,
            "route_prefix": None,  # no HTTP way to the model round the gateway
            "import_path": IMPORT_PATH,
            "args": self.queue.model_dump(),
            "runtime_env": {"env_vars": dict(self.env_vars)} if self.env_vars else {},
            "deployments": [self._deployment()],
        }

    def _deployment(self) -> dict[str, Any]:
        use_gpu = self.serves.device.startswith("cuda")
        size = SIZES[self.size]
        key_path = self.serves.registry_key_path
        return {
            "name": DEPLOYMENT_NAME,
            "autoscaling_config": PROFILES[self.profile].autoscaling_config(),
            "ray_actor_options": size.actor_options(use_gpu=use_gpu),
            # Replicas start in a folder of Ray's choosing, where a relative path leads nowhere.
            "user_config": {
                **self.serves.model_dump(),
                "registry_path": str(Path(self.serves.registry_path).resolve()),
                "registry_key_path": None if key_path is None else str(Path(key_path).resolve()),
                "gpu_share": size.num_gpus if use_gpu else self.serves.gpu_share,
            },
            "max_ongoing_requests": MAX_ONGOING_REQUESTS,
            "max_queued_requests": -1,  # the gateway bounds what waits; a second bound here would shed its bursts
            "graceful_shutdown_timeout_s": GRACEFUL_SHUTDOWN_TIMEOUT_S,
            "graceful_shutdown_wait_loop_s": GRACEFUL_SHUTDOWN_WAIT_LOOP_S,
            "health_check_period_s": HEALTH_CHECK_PERIOD_S,
            "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        }


def build_config(*applications: ServedApplication) -> dict[str, Any]:
    """The whole Serve configuration: body of the REST PUT, or YAML for `serve deploy`.

    The PUT deletes every application that an earlier PUT declared and this one leaves out.

    Raises:
        ValueError: No application, or two of one name.
    """
    names = [application.name for application in applications]
    if not names or len(set(names)) != len(names):
        raise ValueError("a configuration needs at least one application, each with a name of its own")
    return {
        "proxy_location": "Disabled",  # only handles reach the replicas
        "logging_config": {"enable_access_log": False, "log_level": "INFO"},
        "applications": [application.application() for application in applications],
    }
