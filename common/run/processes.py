"""Several processes wait for each other, as long as it takes and nobody has died."""

import contextlib
import threading
import time
from typing import Any, NoReturn

import torch.distributed as dist
from accelerate.utils import gather_object

from ..errors import UserError

BEAT_SECONDS = 5  # between two signs of life of a process
SILENCE_SECONDS = 120  # after which it counts as dead


class Processes:
    """Meetings of the processes of a run, in the store that they were started with.

    A collective operation has a time limit, which must be short to end a deadlock soon, and long
    for whoever waits while the main process evaluates. Here each process gives a sign of life from
    a thread, and one waits for another as long as these come.
    """

    def __init__(self, count: int, run: str):
        self._count, self._run, self._ended = count, run, threading.Event()

    def __enter__(self) -> "Processes":
        if self._count > 1:
            store = dist.PrefixStore(self._run, dist.distributed_c10d._get_default_store())
            self._rank, self._store = dist.get_rank(), store
            own = store.clone()  # a connection of its own
            self._thread = threading.Thread(target=self._beat, args=(own,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended.set()
        if self._count > 1:
            self._thread.join(1)

    def agree(self, what: str, value: Any) -> None:
        """`UserError` in all processes where `value` is not the same in all of them."""
        if self._count > 1:
            values = gather_object([value])
            if any(other != values[0] for other in values):
                raise UserError(
                    f"the processes do not find the same {what}: {', '.join(map(str, values))}; "
                    "put what --data_dir, --run_dir and --resume name where all machines see it"
                )

    def meet(self, name: str) -> None:
        """Return when all processes have called this with that `name`, a new one each time.

        Raises:
            UserError: one of the others has given no sign of life for two minutes.
        """
        if self._count > 1:
            self._store.set(f"{name}: {self._rank}", "here")
            for rank in range(self._count):
                self._wait_for(rank, name)

    def _wait_for(self, rank: int, name: str) -> None:
        beats, heard, pause = -1, time.monotonic(), 0.001
        while True:
            try:
                if self._store.check([f"{name}: {rank}"]):
                    return
                now = self._store.add(f"beats: {rank}", 0)
            except dist.DistNetworkError:  # the store was in a process that has ended
                self._stop(f"the connection to process {rank} is lost")
            time.sleep(pause := min(2 * pause, 0.5))
            if now != beats:
                beats, heard = now, time.monotonic()
            elif time.monotonic() - heard > SILENCE_SECONDS:
                self._stop(f"process {rank} has given no sign of life for {SILENCE_SECONDS} s")

    def _stop(self, reason: str) -> NoReturn:
        raise UserError(f"{reason}; go on with --resume {self._run}", of_one_process=True)

    def _beat(self, store: dist.Store) -> None:
        with contextlib.suppress(dist.DistError):  # whoever kept the store has ended
            while not self._ended.wait(BEAT_SECONDS):
                store.add(f"beats: {self._rank}", 1)
