"""The rollout: read by operators, moved by administrators."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.api.bodies import body_of, read_command
from app.api.deps import Admin, Gateway, GatewayDep, Operator
from app.api.schemas import problems
from app.auth import Principal
from app.errors import Conflict, StateUnavailable
from app.rollout import moves
from app.rollout.audit import Action
from app.rollout.moves import By, MoveRefused
from app.rollout.plan import Plan, ShareOfCallers
from app.rollout.record import Account, Reason, Record
from app.rollout.rollout import NotStored
from app.rollout.state import StateAway, StateConflict, StateDoubtful, StateUnreadable

_LOGGER = logging.getLogger(__name__)

_MAX_PLAN_BYTES = 16 * 1024

router = APIRouter(prefix="/rollout", tags=["rollout"], responses=problems(401, 403, 429))

_REFUSALS: dict[int | str, dict[str, Any]] = {
    **problems(400, 409, 413, 415, 422, 504),
    503: {"description": "The store of the rollout is away; the detail says whether it may have been changed."},
}


class Command(BaseModel):
    """What every move may say beside itself."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    reason: Annotated[Reason, Field(description="Why; kept in the audit log.")] = ""


class NewShare(Command):
    """What `PUT /rollout` takes: one share, of everybody or of one principal or tenant."""

    ray_serve_fraction: Annotated[
        ShareOfCallers | None, Field(description="Share of callers whom Ray Serve answers, beside legacy.")
    ] = None
    share: Annotated[ShareOfCallers | None, Field(description="Share of callers on the canary.")] = None
    account: Annotated[
        Account | None,
        Field(description="`sub:NAME`, `sub:TENANT/NAME` or `tenant:NAME`: whose share it is; without, everybody's."),
    ] = None
    clear: Annotated[bool, Field(description="The account has the common share again.")] = False

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if [self.ray_serve_fraction is not None, self.share is not None, self.clear].count(True) != 1:
            raise ValueError("give one of ray_serve_fraction, share and clear")
        if self.account is None and self.clear:
            raise ValueError("clear needs an account")
        return self


class Start(Command):
    """What `POST /rollout/start` takes."""

    # A plan has its own types, and reads times and tuples from what JSON has for them.
    model_config = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False)

    plan: Plan = Plan()


class Promotion(Command):
    """What `POST /rollout/promote` takes."""

    epoch: Annotated[
        str | None,
        Field(max_length=64, description="`epoch` of `GET /rollout` when it was decided: 409 where the plan moved on."),
    ] = None


class RollBack(Command):
    """What `POST /rollout/rollback` takes."""

    to: Annotated[
        Literal["stable", "legacy"],
        Field(description="`stable`: nobody on the canary. `legacy`: everybody on legacy, whatever the arms were."),
    ] = "stable"


@router.get("")
async def show_rollout(gateway: GatewayDep, _: Operator) -> dict[str, Any]:
    """What is in force, since when, and by whom; of a plan, where it stands and what its guards have seen."""
    return await _document(gateway)


@router.put("", openapi_extra={"requestBody": body_of(NewShare)}, responses=_REFUSALS)
async def set_share(request: Request, gateway: GatewayDep, principal: Admin) -> dict[str, Any]:
    """Change a share; it is kept over restarts, and callers already moved stay moved while it grows.

    A plan that is being run stops there.
    """
    wish = await read_command(request, NewShare)

    def move(record: Record, by: By) -> Record:
        if wish.account is not None:
            return moves.set_override(record, wish.account, _share_in(record, wish), by)
        share = _share_in(record, wish)
        assert share is not None, "only an account's share can be cleared"
        return moves.set_share(record, share, by)

    return await _move(gateway, principal, "share" if wish.account is None else "override", wish, move)


@router.post("/start", openapi_extra={"requestBody": body_of(Start)}, responses=_REFUSALS)
async def start(request: Request, gateway: GatewayDep, principal: Admin) -> dict[str, Any]:
    """Begin a plan; without one, the default: 1, 5, 25, 50 and 100 % from legacy to Ray Serve."""
    wish = await read_command(request, Start, max_bytes=_MAX_PLAN_BYTES)
    run_id = secrets.token_hex(8)
    return await _move(gateway, principal, "start", wish, lambda record, by: moves.start(record, wish.plan, run_id, by))


@router.post("/pause", openapi_extra={"requestBody": body_of(Command)}, responses=_REFUSALS)
async def pause(request: Request, gateway: GatewayDep, principal: Admin) -> dict[str, Any]:
    """Stay at the present step; its guards are watched on."""
    return await _move(gateway, principal, "pause", await read_command(request, Command), moves.pause)


@router.post("/resume", openapi_extra={"requestBody": body_of(Command)}, responses=_REFUSALS)
async def resume(request: Request, gateway: GatewayDep, principal: Admin) -> dict[str, Any]:
    """Go on after a pause; the step begins anew."""
    return await _move(gateway, principal, "resume", await read_command(request, Command), moves.resume)


@router.post("/promote", openapi_extra={"requestBody": body_of(Promotion)}, responses=_REFUSALS)
async def promote(request: Request, gateway: GatewayDep, principal: Admin) -> dict[str, Any]:
    """On to the next step now: opens a manual gate, and does not wait for what a step still asks for."""
    wish = await read_command(request, Promotion)
    # Of two who promote at one time, one does, and the other is told.
    epoch = wish.epoch or gateway.rollout.record.epoch
    return await _move(gateway, principal, "promote", wish, lambda record, by: moves.promote(record, by, epoch))


@router.post("/rollback", openapi_extra={"requestBody": body_of(RollBack)}, responses=_REFUSALS)
async def roll_back(request: Request, gateway: GatewayDep, principal: Admin) -> dict[str, Any]:
    """Nobody on the canary any more, at once; ends the plan that is being run. Possible at any time."""
    wish = await read_command(request, RollBack)
    move = moves.roll_back if wish.to == "stable" else moves.roll_back_to_legacy
    return await _move(gateway, principal, "rollback", wish, move)


def _share_in(record: Record, wish: NewShare) -> float | None:
    """The canary's share that is wished for. Raises `MoveRefused` where Ray Serve has no share apart from an arm's."""
    if wish.ray_serve_fraction is None:
        return wish.share
    match record.stable.backend, record.canary.backend:
        case "legacy", "ray_serve":
            return wish.ray_serve_fraction
        case "ray_serve", "legacy":
            return 1.0 - wish.ray_serve_fraction
    raise MoveRefused(f"{record.stable.arm()} and {record.canary.arm()} are on one backend: give `share` instead")


async def _move(
    gateway: Gateway, principal: Principal, action: Action, wish: Command, move: Callable[[Record, By], Record]
) -> dict[str, Any]:
    by = By(principal.full_name, gateway.wall_clock(), wish.reason)

    def checked(record: Record) -> Record:
        moved = move(record, by)
        _require_answers(gateway, record, moved)
        return moved

    try:
        await gateway.rollout.change(checked, action)
    except MoveRefused as refused:
        raise Conflict(str(refused)) from None
    except NotStored as error:
        _LOGGER.error("the rollout is in force and could not be stored: %s", error)
        raise StateUnavailable("it is in force until this gateway ends, but could not be stored") from None
    except StateDoubtful:
        raise StateUnavailable("it may have been changed; look before trying again") from None
    except (StateAway, StateConflict):
        raise StateUnavailable from None
    except (StateUnreadable, OSError) as error:
        _LOGGER.warning("the rollout could not be stored: %s", error)
        raise StateUnavailable("the change could not be stored; try again") from None
    return await _document(gateway)


def _require_answers(gateway: Gateway, record: Record, moved: Record) -> None:
    """Raises `MoveRefused` where callers are to be moved back to a backend that is not here."""
    is_moved = (moved.share, moved.stable) != (record.share, record.stable)
    backend = moved.stable.backend
    if is_moved and moved.share < 1 and backend not in gateway.dispatcher.arms_serving(None):
        raise MoveRefused(f"{backend} is not configured here: those who are not the canary's would have nobody")


async def _document(gateway: Gateway) -> dict[str, Any]:
    record = gateway.rollout.record
    return {
        "ray_serve_fraction": record.ray_serve_share,
        **record.document(),
        "stable": str(record.stable.arm()),
        "canary": str(record.canary.arm()),
        "epoch": record.epoch,
        "backends": sorted(gateway.dispatcher.arms_serving(None)),
        "judgement": await gateway.controller.findings(),
    }
