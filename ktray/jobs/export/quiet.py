"""Silence for libraries that print progress and advice about their own internals, also from C++."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within this context, everything that is printed or logged by any code of this process is dropped."""
    before = logging.root.manager.disable
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        hidden = stack.enter_context(tempfile.TemporaryFile("w"))
        stack.enter_context(contextlib.redirect_stdout(hidden))
        stack.enter_context(contextlib.redirect_stderr(hidden))
        for number in (1, 2):  # what C++ prints does not pass through Python's streams
            saved = os.dup(number)
            stack.callback(os.close, saved)
            stack.callback(os.dup2, saved, number)
            os.dup2(hidden.fileno(), number)
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)
