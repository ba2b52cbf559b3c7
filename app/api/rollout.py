"""The share of Ray Serve: read by operators, set by administrators."""

from __future__ import annotations

import logging
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from app.api.bodies import body_of, read_command
from app.api.deps import Admin, GatewayDep, Operator
from app.api.schemas import problems
from app.errors import StateUnavailable
from app.rollout.state import StateAway, StateConflict, StateDoubtful, StateUnreadable

_LOGGER = logging.getLogger(__name__)

router = APIRouter(prefix="/rollout", tags=["rollout"], responses=problems(401, 403, 429))


class NewShare(BaseModel):
    """What `PUT /rollout` takes."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    ray_serve_fraction: Annotated[float, Field(ge=0, le=1, description="Share of callers whom Ray Serve answers.")]


@router.get("")
async def show_rollout(gateway: GatewayDep, _: Operator) -> dict[str, Any]:
    """The share in force, since when, and by whom."""
    return gateway.rollout.document()


@router.put(
    "",
    openapi_extra={"requestBody": body_of(NewShare)},
    responses={
        **problems(400, 413, 415, 422, 504),
        503: {"description": "The store of the share is away; the detail says whether it may have been changed."},
    },
)
async def set_share(request: Request, gateway: GatewayDep, principal: Admin) -> dict[str, Any]:
    """Change the share; it is kept over restarts, and callers already moved stay moved while it grows."""
    share = await read_command(request, NewShare)
    try:
        return await gateway.rollout.set_fraction(share.ray_serve_fraction, principal.subject)
    except StateDoubtful:
        raise StateUnavailable("it may have been changed; look before trying again") from None
    except (StateAway, StateConflict):
        raise StateUnavailable from None
    except (StateUnreadable, OSError) as error:
        _LOGGER.warning("the share could not be stored: %s", error)
        raise StateUnavailable("the share could not be stored; try again") from None
