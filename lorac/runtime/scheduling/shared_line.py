"""The check of a line of waiting requests that tenants share."""

from collections.abc import Sequence

from lorac.errors import OverBudget


def check_line(line: Sequence[str], tenant: str, count: int, most: int) -> None:
    """Check that a line has room for ``count`` more requests of a tenant.

    All tenants with waiting requests have equal shares of the line. A full line still takes a tenant up to its share,
    and is then longer than ``most``: one tenant's requests never keep another tenant's out.

    Args:
        line: the tenant of each waiting request.
        tenant: the tenant that sends the requests.
        count: the number of requests.
        most: the most requests that may wait.

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
