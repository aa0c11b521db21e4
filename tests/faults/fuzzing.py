"""Reads what was damaged at random until the time is up. For processes of their own, which what is read may end."""

from __future__ import annotations

import faulthandler
import random
import resource
import sys
import time
from collections.abc import Callable

from bitport.errors import BitportError

HANG = 20  # seconds for one file; an honest one takes a tenth of one
LONGEST = 5000  # characters that an error says
MEMORY = 12 * 2**30  # of addresses, of which torch maps several GB


def fuzz(
    seconds: float, damage: Callable[[], object], read: Callable[[], object], hang: float = HANG
) -> None:
    """Tell how many were read and how many refused; any other error, a hang or a crash ends the process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    loaded = refused = 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        damage()
        faulthandler.dump_traceback_later(hang, exit=True)
        said = 1
        try:
            read()
            loaded += 1
        except BitportError as error:
            refused += 1
            said = len(str(error))
        if not 0 < said < LONGEST:
            raise SystemExit(f"an error of {said} characters")
        faulthandler.cancel_dump_traceback_later()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    sys.stdout.write(f"loaded {loaded} refused {refused} peak {used} MB\n")


def damaged(content: bytes, dice: random.Random) -> bytes:
    """A few bytes changed, lost or added; now and then the end is missing."""
    found = bytearray(content)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(found))
        found[at : at + 1] = dice.choice((dice.randbytes(1), b"", dice.randbytes(5), b"\xff\xff\xff\x7f"))
    return bytes(found[: dice.randrange(len(found) + 1)] if dice.random() > 0.9 else found)
