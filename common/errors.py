"""`UserError`, the one error that is shown without a trace, and what becomes one."""

import contextlib
import os
from collections.abc import Iterator


class UserError(SystemExit):
    """Bad input: one line that says what is wrong and what to do.

    Being a ``SystemExit``, it reaches the terminal as that line alone and exits with status 1.
    With several processes all of them fail in the same way, so only the first one speaks.
    """

    def __init__(self, message: str):
        message = message.replace("\n", " ")  # other libraries' reasons may have several lines
        is_first_process = os.environ.get("RANK", "0") == "0"
        super().__init__(f"error: {message}" if is_first_process else 1)
        self.message = message

    def __str__(self) -> str:
        return self.message


# what PyTorch's RuntimeErrors say then, on the GPU, on the CPU, and beyond 64 bits
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "Storage size calculation overflowed")


@contextlib.contextmanager
def out_of_memory(advice: str) -> Iterator[None]:
    """A block in which memory that runs out, on CPU or GPU, is a `UserError` with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and not any(sign in text for sign in OUT_OF_MEMORY):
            raise
        reason = text.splitlines()[0] if text else type(error).__name__
        raise UserError(f"memory ran out ({reason}); {advice}") from None
