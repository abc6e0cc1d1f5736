"""The end of a training by several processes."""

from torch import distributed


def leave_process_group() -> None:
    """Leave torch's default process group, if there is one: left to the interpreter's end, it may abort or hang.

    Every process of the group has to call it.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    # The group's end waits for its threads with Python's lock held. One of them may need that to let go of a gathered
    # tensor, and gets it while this process waits for the others.
    distributed.barrier()
    distributed.destroy_process_group()
