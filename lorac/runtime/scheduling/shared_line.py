"""A line of requests that tenants share."""

from collections.abc import Sequence

from lorac.errors import OverBudget


def check_line(line: Sequence[str], tenant: str, count: int, most: int) -> None:
    """Check that a line takes more requests of a tenant.

    A tenant's share of the line is the same for all tenants that wait. A full line still takes a tenant up to its
    share, and is then longer than ``most``: one tenant's requests never keep another's out.

    Args:
        line: the tenants of the requests that wait.
        tenant: sends more.
        count: how many.
        most: how many may wait.

    Raises:
        OverBudget: there is no room (code ``queue_full``).
    """
    own, share = line.count(tenant), -(-most // len({*line, tenant}))
    if len(line) + count > most and own + count > share:
        raise OverBudget(
            f"{own} requests of the tenant wait, {count} more would, and its share of {most} places in line is {share}",
            next_step="submit it again when one of them has begun",
            code="queue_full",
        )
