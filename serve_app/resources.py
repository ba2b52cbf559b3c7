"""How large a replica is: one table of sizes, as Ray actor options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

GIB = 1024**3

SizeName = Literal["small", "medium", "large", "local"]


class Size(BaseModel):
    """What one replica takes of its node.

    Attributes:
        num_cpus: CPUs that Ray's scheduler sets aside.
        num_gpus: Share of one GPU that is set aside when the replica runs on one; 0 for a size without GPU.
        memory_bytes: Memory that the scheduler sets aside; it limits nothing. 0 sets none aside.
        object_store_bytes: Object store per such replica. A node's store is sized when its Ray is started
            (`ray start --object-store-memory`), so this is no option of the replica.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    num_cpus: Annotated[float, Field(gt=0)]
    num_gpus: Annotated[float, Field(ge=0, le=1)]
    memory_bytes: Annotated[int, Field(ge=0)]
    object_store_bytes: Annotated[int, Field(ge=0)]

    def actor_options(self, *, use_gpu: bool) -> dict[str, Any]:
        """`ray_actor_options` of a Serve deployment.

        Args:
            use_gpu: Whether replicas run on a GPU: a setting, because the deploying host may have other hardware.

        Raises:
            ValueError: A GPU is wanted and this size has no share of one.
        """
        if use_gpu and not self.num_gpus:
            raise ValueError("this size has no GPU share: choose small, medium or large")
        options: dict[str, Any] = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus if use_gpu else 0.0}
        if self.memory_bytes:
            options["memory"] = self.memory_bytes
        return options


SIZES: Mapping[SizeName, Size] = {
    "small": Size(num_cpus=1.0, num_gpus=0.25, memory_bytes=GIB, object_store_bytes=GIB // 2),
    "medium": Size(num_cpus=2.0, num_gpus=0.5, memory_bytes=2 * GIB, object_store_bytes=GIB),
    "large": Size(num_cpus=4.0, num_gpus=1.0, memory_bytes=4 * GIB, object_store_bytes=2 * GIB),
    # Two replicas and a candidate version must fit on the smallest machine that runs the rest beside them.
    "local": Size(num_cpus=0.5, num_gpus=0.0, memory_bytes=0, object_store_bytes=GIB // 4),
}
