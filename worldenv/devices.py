"""Which device a name means."""

from __future__ import annotations

import torch


def device_of(name: str) -> torch.device:
    """What `--device` names: auto is cuda where there is one, else cpu. Raises ValueError for one that is not there."""
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return found
