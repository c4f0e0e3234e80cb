"""`UserError`, the one error that is shown without a trace, and what becomes one."""

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """Bad input: one line that says what is wrong and what to do.

    Other code can catch it like any exception; of a script it ends the process with status 1, and
    the line alone reaches the terminal (`common.console.begin`). Where several processes train, the
    first one of each machine shows it, and any that it happens to alone, `of_one_process`.
    """

    def __init__(self, message: str, of_one_process: bool = False):
        self.of_one_process = of_one_process
        self.message = message.replace("\n", " ")  # other libraries' reasons may have several lines
        super().__init__(self.message)


# what PyTorch's RuntimeErrors say then, on the GPU (its libraries last), on the CPU, beyond 64 bits
OUT_OF_MEMORY = (
    *("out of memory", "can't allocate memory", "Storage size calculation overflowed"),
    *("STATUS_ALLOC_FAILED", "unable to find an engine"),
)


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
        raise UserError(f"memory ran out ({reason}); {advice}", of_one_process=True) from None
