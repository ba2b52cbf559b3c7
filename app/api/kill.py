"""The kill switch: seen by operators, thrown by administrators."""

from __future__ import annotations

from typing import Annotated, Any, Self

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.api.bodies import body_of, read_command
from app.api.deps import Admin, GatewayDep, Operator
from app.api.schemas import problems
from app.errors import Conflict
from app.rollout.kill import TooManyKills
from app.rollout.kills import MAX_KILLS, MAX_REASON_CHARS, Scope, check_name

router = APIRouter(prefix="/kill", tags=["kill"], responses=problems(401, 403, 429))


class NewKill(BaseModel):
    """What `PUT /kill` takes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    scope: Annotated[Scope, Field(description="What kind of name it is.")]
    name: Annotated[
        str,
        Field(
            max_length=300,
            description="A model; sub:NAME, sub:TENANT/NAME or tenant:NAME; a symbol tag; none for global.",
        ),
    ] = ""
    killed: Annotated[bool, Field(description="False lifts it.")] = True
    reason: Annotated[str, Field(min_length=1, max_length=MAX_REASON_CHARS, description="Why; for operators alone.")]

    @model_validator(mode="after")
    def _can_be_told(self) -> Self:
        check_name(self.scope, self.name)
        if not self.reason.isprintable():
            raise ValueError("the reason must be printable")
        return self


@router.get("")
async def show_kills(gateway: GatewayDep, _: Operator) -> dict[str, Any]:
    """What is killed, by whom and why, and what was lifted in the last week."""
    return gateway.kills.document()


@router.put(
    "",
    openapi_extra={"requestBody": body_of(NewKill)},
    responses={**problems(400, 413, 415, 422, 504), 409: {"description": "There are too many kills."}},
)
async def change_kill(request: Request, gateway: GatewayDep, principal: Admin) -> dict[str, Any]:
    """Refuse predictions from now on, or no longer; the answer says whom that has reached."""
    new = await read_command(request, NewKill)
    try:
        return await gateway.kills.change(
            new.scope, new.name, killed=new.killed, actor=principal.full_name, reason=new.reason
        )
    except TooManyKills:
        raise Conflict(f"there are {MAX_KILLS} kills: lift some, or kill globally") from None
