"""Commands: arguments in, an exit code out."""

import os

# Threads that wait by spinning long, as OpenMP's do by default, slow each other tenfold where anything else runs; that sleep at once (OMP_WAIT_POLICY
# passive) are half as fast where nothing does. It is read when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
