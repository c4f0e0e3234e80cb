"""A run's life: folder, processes, W&B, signals, checkpoints, clock and bar, means, finite checks.

The script calls the session, the session never calls the script: it knows no method, and it never
calls a model, a loss, backward or an optimizer step.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from .. import console
from ..errors import UserError, out_of_memory
from ..files import read_json, read_rows
from . import checkpoints, runs, runtime, tracking
from .monitor import Monitor
from .processes import Processes
from .sampling import EPOCHS, epoch_batches, local_slice, with_epochs
from .signals import Signals

SHORT_EPOCH = 20  # steps; shorter epochs that are not evaluated share a checkpoint


class Session:
    """One run of `method` with its `config`, new or resumed.

    Attributes:
        accelerator, device, is_main: Accelerate's object, its device, whether this process writes.
        measuring_device: where evaluations take place; `device`, but for Apple's GPU.
        run_dir: the run's folder. finished: it is done already, and `summary` its final metrics.
        epoch, step: those that are done. best: of the chosen epoch, its number and its value.
        constants: values that stand beside the means in every row of the training.
        share: slice of each global batch that belongs to this process.
        steps_per_epoch, total_epochs: of the training, known once it is prepared.
        tracker: the rows, figures and tables of the run, in its folder and in W&B.
    """

    def __init__(self, method: str, config: Any):
        self.method, self.config = method, config
        self.accelerator = runtime.start(config.precision, config.seed, config.resume)
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.measuring_device = runtime.measuring_device(self.device)
        self._moved: tuple[nn.Module, ...] = ()  # to that device, until the training goes on
        chosen = runs.choose_run_dir(config.run_dir, config.resume, method, config.dataset)
        (self.run_dir,) = broadcast_object_list([chosen])  # with the first process's time
        self.summary = runs.finished(self.run_dir)
        self.finished = self.summary is not None
        if self.finished:
            self.say(f"{self.run_dir} is finished already; its results are in summary.json")
        self.epoch, self.step = 0, 0
        self.best: dict[str, float] = {"epoch": 0}
        self.constants: dict[str, float] = {}
        self._seconds = 0.0  # of training in this epoch
        self._saved_step = 0

    def __enter__(self) -> "Session":
        self._signals = Signals(self.run_dir)
        self._exits = contextlib.ExitStack()
        self._exits.enter_context(
            out_of_memory("make --batch_size, --width or --image_size smaller")
        )
        self._exits.callback(self._signals.restore)
        count = self.accelerator.num_processes
        self._processes = self._exits.enter_context(Processes(count, str(self.run_dir)))
        return self

    def __exit__(self, *error: Any) -> None:
        self._exits.__exit__(*error)  # the tracker's first

    def say(self, line: str) -> None:
        """Print a line, in the main process only."""
        console.say(line, self.is_main)

    # ------------------------------------------------------------------------------ Training

    def prepare(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, images: Any, learned: Any
    ) -> tuple:
        """Return model and optimizer for the training step: on the device, with DDP and precision
        as asked for. Open the run's folder and restore its last checkpoint, if any.

        `learned` is the split that the steps go through, of the data set `images`.
        """
        config, accelerator = self.config, self.accelerator
        self._learned, self._images, self._network = learned, len(learned), network
        taken = learned.per_epoch or self._images
        self.share = local_slice(
            taken, config.batch_size, accelerator.process_index, accelerator.num_processes
        )
        self.steps_per_epoch = steps = taken // config.batch_size
        by_default = with_epochs(replace(config, epochs=None), steps).epochs
        if config.epochs is None and by_default > EPOCHS:
            self.say(
                f"an epoch of so few images has {steps} steps, so the training takes {by_default} "
                f"epochs in place of {EPOCHS}; --epochs chooses"
            )
        config = self.config = with_epochs(config, steps)
        self.total_epochs = config.epochs
        self._processes.meet("data")  # some may have decoded images for hours
        self._processes.agree("images (fingerprint)", images.fingerprint)
        runtime.place(runtime.share_batch_norm(network, accelerator), self.device)
        model, optimizer = accelerator.prepare(network, optimizer)
        self._monitor = Monitor(accelerator, network)
        self._parts = {"network": network, "optimizer": optimizer, "monitor": self._monitor}
        self._parts |= {"scaler": accelerator.scaler}
        self._same = {"fingerprint": images.fingerprint}
        facts = {"method": self.method, "class_names": images.class_names, **self._same}
        facts["train_images"] = len(images.train)  # with labels
        facts["learned_images"] = taken
        facts["parameters"] = sum(parameter.numel() for parameter in network.parameters())

        state = checkpoints.load_last(self.run_dir / "checkpoints", expected=self._same)
        self._processes.agree("run to resume (step)", state and state["step"])
        tracker = tracking.open_tracker(
            self.run_dir,
            settings=asdict(config),
            facts={**runtime.facts(accelerator), **facts},
            labels=runs.labels(
                self.method, asdict(config), asdict(type(config)()) | {"epochs": by_default}
            ),
            mode=config.tracking,
            project=config.project,
            keep_rows=state and state["rows"],
            is_main=self.is_main,
        )
        self.tracker = self._exits.enter_context(tracker)
        self._writer = self._exits.enter_context(checkpoints.Writer())  # ends before the lock
        network.train()
        if state is None:
            self._save()
            self._writer.wait()  # there is room; from here on the run resumes as itself
        else:
            checkpoints.restore(self._parts, state)
            self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
            self._seconds, self._saved_step = state["seconds"], state["step"]
            self.say(f"resuming {self.run_dir} at epoch {self.epoch + 1}, step {self.step}")
            if (before := state["processes"]) != (now := accelerator.num_processes):
                what = "rounding and, on a CPU, batch norm, which sees the share of one process"
                self.say(f"processes before: {before}, now: {now}, which changes {what}")
            if self.is_main:  # auto may mean another precision on this machine
                began = read_json(self.run_dir / "config.json")["facts"]["mixed_precision"]
                if began != (now := accelerator.mixed_precision):
                    self.say(f"precision at the start: {began}, now: {now}, which changes rounding")
        return model, optimizer

    def compile(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """What a step computes in front of `backward`, compiled if --compile=True says so.

        Not in the first step of a run, where a script may walk through the graph several times.
        """
        if not self.config.compile:
            return compute
        compiled, is_new = runtime.compile_step(compute, self.accelerator), True

        def step(*words: Any) -> Any:
            nonlocal is_new
            if self.step == 0:
                return compute(*words)
            started = time.perf_counter()
            values = compiled(*words)
            if is_new:
                self.say(f"compiled the training step in {time.perf_counter() - started:.0f} s")
                is_new = False
            return values

        return step

    def epochs(self) -> Iterator[int]:
        """The numbers, from 0, of the epochs that are left; then the other processes are let go."""
        while self.epoch < self.total_epochs:
            yield self.epoch
            if self._is_evaluated:  # by the main process alone, which may take hours
                self._processes.meet(f"epoch {self.epoch}")
            self.epoch, self._seconds = self.epoch + 1, 0.0
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def batches(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The steps of this epoch that are left: their number from 0, which training images this
        process takes, int64 (B,), and these, uint8 (B,C,S,S). Between two steps it logs, saves and
        stops where asked.

        The order is a pure function of seed and epoch, the same for any number of processes.
        """
        config, steps = self.config, self.steps_per_epoch
        for module in self._moved:
            module.to(self.device)
        first, self._moved = self.epoch * steps, ()
        order = epoch_batches(self._images, config.batch_size, config.seed, self.epoch, steps)
        left = self._learned.batches(order[self.step - first :, self.share])
        started, optimizer = time.perf_counter() - self._seconds, self._parts["optimizer"]
        title = f"epoch {self.epoch + 1}/{config.epochs}"
        with (
            self._signals.deferred(),
            console.progress(steps, title, self.is_main) as bar,
        ):
            bar.update(self.step - first)
            for done, (positions, images) in enumerate(left):
                with runtime.forbid_waiting(self.device, done):
                    yield self.step, positions, images
                self.step += 1
                bar.update()
                is_end = self.step == first + self.steps_per_epoch
                is_row = self.step % config.log_every == 0
                if is_row or (is_end and not self._passes_quickly):
                    self._stop_if_not_finite()
                    row = self._monitor.means() | self.constants
                    row["train/learning_rate"] = optimizer.param_groups[0]["lr"]
                    self.tracker.log(row, self.step, self.step / self.steps_per_epoch)
                    bar.set_postfix_str(f"loss {row['train/loss']:.4f}")
                self._seconds = time.perf_counter() - started
                # with several processes, asking waits for a GPU
                waits = self.accelerator.num_processes > 1 and self.device.type != "cpu"
                asks = is_row or is_end or not waits
                if asks and (number := self._signals.agreed(self.accelerator)):
                    try:
                        self._stop_if_not_finite()
                        self._save()
                        self._writer.wait()
                    except UserError as error:  # the signal counts: a study ends, too
                        self.say(str(error))
                    self._signals.leave(number)
            # not where a resumed run has just begun
            if self._saved_step < self.step and not self._passes_quickly:
                self._save()  # before the evaluation, which a signal ends and a resume repeats

    def log_step(self, **values: Tensor) -> None:
        """Report values () of the step, `loss` among them; their means become `train/NAME`."""
        self._monitor.add(**values)

    @property
    def loss(self) -> float:
        """The mean training loss of the last row, NaN before the first."""
        return self._monitor.last.get("train/loss", math.nan)

    def evaluates(self, *modules: nn.Module) -> bool:
        """Whether this process evaluates after this epoch; `modules` are then on the device for it,
        until the next epoch begins.
        """
        if is_due := self.is_main and self._is_evaluated:
            self._to_measure(modules)
        return is_due

    def _to_measure(self, modules: tuple[nn.Module, ...]) -> None:
        if self.measuring_device != self.device:
            self._moved = modules
            for module in modules:
                module.to(self.measuring_device)

    @property
    def _is_evaluated(self) -> bool:
        done, every = self.epoch + 1, self.config.evaluate_every
        return done % every == 0 or done == self.config.epochs

    @property
    def _passes_quickly(self) -> bool:
        """Whether this epoch is too short for a row and a checkpoint of its own."""
        # of the step alone, so that a resumed run has the rows of one that was never stopped
        is_due = self.step % SHORT_EPOCH < self.steps_per_epoch
        return not (is_due or self._is_evaluated)

    def log_epoch(
        self, row: Mapping[str, float], *, minimize: str = "", maximize: str = ""
    ) -> None:
        """Log what was measured after this epoch, and keep the weights of the best one.

        `minimize` or `maximize` names the metric that decides which epoch is best; without either
        it is the last. `UserError` for a value that is no finite number: the training has diverged.
        """
        if wrong := [name for name, value in row.items() if not math.isfinite(value)]:
            raise self._diverged(f"not finite on validation: {', '.join(wrong)}")
        cost = runtime.cost(
            self.device, self._seconds, self.steps_per_epoch * self.config.batch_size
        )
        self.tracker.log({**row, **cost}, self.step, self.epoch + 1)
        said = ", ".join(
            f"{name.replace('/', ' ')} {value:.{'2%' if 'accuracy' in name else '5f'}}"
            for name, value in row.items()
        )
        self.say(
            f"epoch {self.epoch + 1}/{self.config.epochs}: loss {self.loss:.4f}, {said}, "
            f"{cost['time/images_per_second']:,.0f} images/s"
        )
        name, sign = (minimize, -1) if minimize else (maximize, 1)
        if name not in self.best or sign * row[name] > sign * self.best[name]:
            self.best = {name: row[name]} if name else {}
            self.best["epoch"] = self.epoch + 1
            weights = checkpoints.snapshot(self._network.state_dict())
            self._writer.start(checkpoints.save_best, self.run_dir / "checkpoints", weights)
            self.tracker.best(self.best)

    def _stop_if_not_finite(self) -> None:
        if problem := self._monitor.problem():
            raise self._diverged(problem)

    def _diverged(self, problem: str) -> UserError:
        self._writer.wait()
        return UserError(
            f"{problem}, at step {self.step} or shortly before it (precision "
            f"{self.accelerator.mixed_precision}); start a new run with a lower "
            f"--learning_rate; {self.run_dir} is kept as of step {self._saved_step}"
        )

    def _save(self) -> None:
        state = {**self._same, "epoch": self.epoch, "step": self.step, "best": self.best}
        state |= {"processes": self.accelerator.num_processes}
        state |= {"seconds": self._seconds, "rows": self.tracker.rows}
        state |= checkpoints.states(self._parts)
        self._saved_step = self.step
        if self.is_main:
            state = checkpoints.snapshot(state)
            self._writer.start(checkpoints.save_last, self.run_dir / "checkpoints", state)

    # ------------------------------------------------------------------------------ Evaluation

    def load_best(self, network: nn.Module, *others: nn.Module) -> None:
        """Give `network` the weights of the best epoch; freeze it, in eval mode.

        It and the `others` are then on the device for measuring.
        """
        self._writer.wait()
        last = network.state_dict(), {"epoch": self.epoch}
        weights, self.best = checkpoints.load_best(
            self.run_dir / "checkpoints", self.best, otherwise=last
        )
        network.load_state_dict(weights)
        network.requires_grad_(False).eval()
        self._to_measure((network, *others))

    def log(self, row: Mapping[str, float]) -> None:
        """Log a row after the training, one step and one epoch on."""
        self.step, self.epoch = self.step + 1, self.epoch + 1
        self.tracker.log(row, self.step, self.epoch)

    def rows(self) -> list[dict[str, float]]:
        """All rows logged so far."""
        return read_rows(self.run_dir / "metrics.jsonl")

    def finish(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Log the final metrics, send the networks to W&B, write summary.json, end the run.

        Returns the summary: the last value of each metric, but those of validation are of the
        network that is kept, that of the best epoch; then that epoch as best/NAME.
        """
        # the curves of validation end with the last epoch
        final = {name: value for name, value in metrics.items() if not name.startswith("val/")}
        if final:
            self.tracker.log(final, self.step, self.epoch)
        files = [self.run_dir / "encoder.json", *sorted(self.run_dir.glob("*.safetensors"))]
        name = f"{self.method}-{runs.data_name(asdict(self.config))}"
        self.tracker.artifact(name, "model", files, metrics, ["best"])
        summary = {
            name: value
            for row in self.rows()
            for name, value in row.items()
            if "/" in name and (row["epoch"] == self.best["epoch"] or not name.startswith("val/"))
        }
        summary |= {**metrics, **{f"best/{name}": value for name, value in self.best.items()}}
        for line in ("", *self.tracker.finish(summary)):
            self.say(line)
        return summary
