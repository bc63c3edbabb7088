"""Commands: arguments in, an exit code out."""

import os
import sys
from types import TracebackType

# Threads that wait by spinning long, as OpenMP's do by default, slow each other tenfold where anything else runs; that sleep at once (OMP_WAIT_POLICY
# passive) are half as fast where nothing does. It is read when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _stopped(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A command that is interrupted where it does not see to that itself, as while it imports, says so in a line. Python ends with SIGINT: 130."""
    if not issubclass(kind, KeyboardInterrupt) or hasattr(sys, "ps1"):
        sys.__excepthook__(kind, error, trace)
        return
    if "--multiprocessing-fork" not in sys.orig_argv:  # of several processes one speaks
        name = os.path.basename(sys.argv[0])
        print(f"{name if name.startswith('worldenv-') else 'worldenv'}: stopped", file=sys.stderr)


if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _stopped
