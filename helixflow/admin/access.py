"""`helixflow session`, and second factors: who is logged in, and by what."""

from argparse import Namespace

from helixflow.admin.errors import AdminError
from helixflow.admin.operator import Operator, Outcome
from helixflow.admin.table import Column, table
from helixflow.admin.values import moment_text


async def session_list(operator: Operator, options: Namespace) -> Outcome:
    """Sessions that are not over, of everybody or of one user."""
    rows = await operator.rows("ListSessions", "SessionsRequest", {"user": options.user})
    columns = [
        Column("ID"),
        Column("USER", cut=True),
        Column("BY"),
        Column("FROM"),
        Column("BEGUN (UTC)"),
        Column("LAST USED (UTC)"),
    ]
    cells = [
        (
            row["id"],
            row["user"],
            row["method"],
            row["address"],
            moment_text(row["created_at"]),
            moment_text(row["last_used_at"]),
        )
        for row in rows
    ]
    return Outcome({"data": rows}, table(columns, cells, "nobody is logged in"))


async def session_end(operator: Operator, options: Namespace) -> Outcome:
    """Ends one session, or all of a user."""
    if bool(options.session) == bool(options.user):
        raise AdminError("name one session, or a user with --user")
    if options.session:
        gone = await operator.call("EndSession", "SessionRequest", {"session": options.session})
        return Outcome(gone, f"the session {options.session} is over")
    gone = await operator.call("EndSessions", "UserRequest", {"user": options.user})
    return Outcome(gone, f"{gone['ended']} sessions of {options.user} are over")


async def user_reset_factor(operator: Operator, options: Namespace) -> Outcome:
    """Removes a second factor that was lost."""
    user = await operator.call("ResetFactor", "UserRequest", {"user": options.user})
    return Outcome(user, f"{user['email']} has no second factor now; the user's sessions have ended")


async def require_factor(operator: Operator, options: Namespace) -> Outcome:
    """Says from which role on a second factor is needed."""
    role = "" if options.role == "nobody" else options.role
    made = await operator.call(
        "RequireFactor", "RequireFactorRequest", {"organisation": options.organisation, "role": role}
    )
    needs = f"from the role {role} on, a password needs" if role else "nobody needs"
    return Outcome(made, f"{made['name']}: {needs} a second factor")
