"""Commands: arguments in, an exit code out."""

import os

# Threads that wait by spinning, as OpenMP's do by default, slow each other tenfold where anything else runs. It is read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
