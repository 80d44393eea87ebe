"""Functions for worker processes, which import them."""

import os


def double(task, advance):
    """Returns twice a number, and advances by it."""
    advance(task)
    return 2 * task


def die_at_two(task, advance):
    """Ends the process at task 2, as the system does when memory runs out."""
    return os._exit(9) if task == 2 else double(task, advance)
