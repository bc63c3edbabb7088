"""A function with one thing wrong in it, to see whether a test notices."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

import pytest


def mutate(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, old: str, new: str) -> None:
    """Replace `old` by `new` in the source of `owner.name`, which must hold it once."""
    function = inspect.getattr_static(owner, name)
    function = function.__func__ if isinstance(function, classmethod) else function
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, source
    module = inspect.getmodule(function)
    assert module is not None
    # The class body's own name lets a bare super() work outside of it.
    source = source.replace(old, new).replace("super()", f"super({owner.__name__}, self)")
    scope = dict(vars(module))
    exec(source, scope)
    made = scope[name]
    monkeypatch.setattr(owner, name, classmethod(made.__func__) if isinstance(made, classmethod) else made)
