"""How a program ends: with an exit status, and where something went wrong that a user can repair with one line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from aquilamoe.config.messages import UserError, without_passwords
from aquilamoe.process import errors, interruption, standard_output, temporary


@contextmanager
def in_one_line() -> Iterator[None]:
    """Around all that a program does. A traceback remains for our own mistakes alone."""
    interruption.handle()
    standard_output.guard()
    temporary.name_user()
    try:
        yield
        interruption.check()
    except UserError as error:
        raise _failure(str(error)) from None
    except KeyboardInterrupt as caught:
        status = interruption.end()
        remedy = str(caught) or "the same command continues where this stopped"
        print(f"\ninterrupted; {remedy}", file=sys.stderr)
        raise SystemExit(status) from None
    except SystemExit as ended:  # of --help
        if ended.code:
            raise
    except Exception as error:
        if (line := errors.described(error)) is None:
            raise
        raise _failure(line) from None
    if standard_output.is_lost():
        raise SystemExit(1)


def _failure(text: str) -> SystemExit:
    """A line for each problem."""
    return SystemExit("\n".join(f"error: {line}" for line in without_passwords(text).splitlines()))
