"""Memory-augmented training of the side network (LongMem, section 2.3) on accelerate: one loop for a laptop and for a cluster.

A step reads one window of every lane. The frozen backbone runs first, or its features are read from where they were kept;
then the side network predicts the window, reading the memory of the lane's earlier text; after the backward pass the window
enters memory. All but the side network is a pure function of text and step, so a run can stop anywhere and go on. What an
`Extension` adds is its own affair, in checkpoints too.
"""

import contextlib
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor

from longmem.backbone.capture import BackboneStates
from longmem.data import LaneBatch, process_lanes
from longmem.data.lanes import NO_LABEL
from longmem.evaluation.folder import as_json
from longmem.files import make_folder, refuse_link, write_file
from longmem.plots import require_matplotlib
from longmem.settings import save_settings
from longmem.settings.environment import chosen_device, environment
from longmem.training import setup
from longmem.training.checkpoints import Checkpoints, Interruption, Trained
from longmem.training.curve import plot_training
from longmem.training.encode_ahead import EncodeAhead
from longmem.training.extension import Extension
from longmem.training.features import FrozenFeatures
from longmem.training.lane_memory import LaneMemories, preceding_tokens, scheduled_capacity
from longmem.training.local_updates import LocalUpdates, num_targets
from longmem.training.losses import long_context_weights, token_losses
from longmem.training.progress import training_progress
from longmem.training.records import RunLog, StepRecord, ValidationRecord, read_log
from longmem.training.settings import TrainingSettings, validate_settings

ENVIRONMENT = "environment.json"  # of a run, which knows its folder by it


@dataclasses.dataclass
class StepSums:
    """Sums over the targets of one optimizer step, of this process until they are reduced."""

    loss: float = 0.0
    backbone_loss: float = 0.0
    memory_tokens: float = 0.0
    memory_share: float = 0.0
    reads: float = 0.0  # batches in which some lane found something
    batches: float = 0.0


class Trainer:
    """A training run, ready to start, or to go on from its newest checkpoint.

    `settings` are all that determines the run, written to `settings.output` as `config.yaml`; `extensions`, what it does beside
    training the side network. The first process tells the run on `console`; None is silent. Raises ValueError if the folder
    holds a run with other settings, or data and settings do not fit each other.
    """

    def __init__(
        self, settings: TrainingSettings, console: Console | None = None, extensions: Sequence[Extension] = ()
    ) -> None:
        validate_settings(settings)
        require_matplotlib()  # for the curve, at the end
        self.settings, self.folder = settings, Path(settings.output)
        optimization = settings.optimization
        if optimization.mixed_precision == "fp16" and not torch.accelerator.is_available():
            raise ValueError(
                "`optimization.mixed_precision` must be no or bf16 where there is no GPU, got 'fp16'; bf16 computes "
                "with the same number of bits."
            )
        ddp = DistributedDataParallelKwargs(find_unused_parameters=True)  # empty memories give biases no gradient
        # Without an accelerator it must be told: else processes started on a CPU would not know of each other.
        on_cpu, precision = chosen_device().type == "cpu", optimization.mixed_precision
        self.accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision, kwargs_handlers=[ddp])
        if self.accelerator.gradient_accumulation_steps != 1:  # it would divide every loss by it
            raise ValueError(
                "gradient accumulation must be set by `optimization.gradient_accumulation`, got "
                f"{self.accelerator.gradient_accumulation_steps} from the settings of `accelerate launch`; set it to 1 there."
            )
        self.console = console if console is not None and self.accelerator.is_main_process else Console(quiet=True)
        set_seed(settings.seed)
        self.extensions = tuple(extensions)
        self.checkpoints = Checkpoints(self.folder, settings.checkpoints.keep, self.extensions)
        refuse_link(self.folder / "side-network")
        if step := self.checkpoints.find(self.accelerator):
            self.checkpoints.refuse_changed_settings(settings, step)
        own = self.folder / "config.yaml"
        if own.exists() and not (step or (self.folder / ENVIRONMENT).exists()):
            raise ValueError(
                f"`output` must be a new folder or that of a run, but {own} is of none; give another one, or remove that file."
            )
        self.model = setup.make_model(settings, self.accelerator.device)
        origin = {"model.backbone": setup.backbone_fingerprint(self.model)}  # before an extension changes it
        for each in self.extensions:
            each.start(self)
        self.lanes = setup.make_lanes(settings, self.model.tokenizer, self.accelerator)
        self.own = process_lanes(settings.data.lanes, self.accelerator.process_index, self.accelerator.num_processes)
        self.steps = setup.total_steps(optimization, self.lanes)
        self.validation = setup.make_validation(settings, self.model, self.accelerator)
        kept = settings.features
        self.frozen = FrozenFeatures(self.model, kept.folder, getattr(torch, kept.dtype), kept.max_gigabytes)
        self.features: FrozenFeatures | EncodeAhead = self.frozen
        self.backbone_lock = threading.Lock()
        dtype = "bfloat16" if optimization.mixed_precision == "bf16" else "float16"  # in which reading computes
        options = {"index": settings.memory.index, "storage_dtype": dtype}
        for each in self.extensions:
            options |= each.bank_options()
        keep, foreign = settings.data.at_document_border == "keep", settings.memory.foreign_lanes
        self.memories = LaneMemories(self.model, len(self.own), keep_documents=keep, foreign_lanes=foreign, **options)
        self.trained = setup.select_trained(self.model, optimization.trained, reads_memory=settings.memory.enabled)
        further_groups = [group for each in self.extensions for group in each.parameter_groups()]
        self.further_parameters = [parameter for group in further_groups for parameter in group["params"]]
        optimizer = setup.make_optimizer(self.trained, optimization, further_groups)
        self.schedule = setup.make_schedule(optimizer, optimization, self.steps)
        self.side_network, self.optimizer = self.accelerator.prepare(self.model.side_network, optimizer)
        self.local_updates = LocalUpdates(self.accelerator, settings.exchange.every_steps, self.steps)
        origin["model.backbone"] += f"-{setup.frozen_fingerprint(self.model)}"
        origin["data.train"] = self.lanes.fingerprint
        self.checkpoints.trained = Trained(self.side_network, self.optimizer, self.schedule, settings, origin)
        self.step = self.checkpoints.restore(self.accelerator)

    def run(self) -> list[StepRecord]:
        """Train to the last step, or until stopped; return this call's records. The side network is saved either way."""
        settings, records = self.settings, []
        if main := self.accelerator.is_main_process:
            make_folder(self.folder)
            write_file(self.folder / ENVIRONMENT, as_json(environment()))
            save_settings(settings, self.folder / "config.yaml")
        num_trained = sum(each.numel() for each in (*self.trained.values(), *self.further_parameters))
        if self.step == self.steps:
            self.console.print(f"All {self.steps:,} steps were done before.", highlight=False)
        for line in setup.introduction(settings, self.lanes, self.steps, num_trained, self.frozen):
            self.console.print(line, highlight=False, soft_wrap=True)
        encoder = self.model.encoder_stamp(exact=True)
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(Interruption(settings.optimization.max_minutes))
            log = RunLog(self.folder, settings.logging.tensorboard, self.step + 1) if main else None
            if log is not None:
                stack.enter_context(log)
            if ahead := settings.features.ahead:
                first, last = (step * settings.optimization.gradient_accumulation for step in (self.step, self.steps))
                batches = {"first": first, "last": last, "ahead": ahead}
                thread = EncodeAhead(self.frozen, self._batch, **batches, lock=self.backbone_lock)
                self.features = stack.enter_context(thread)
            show = stack.enter_context(training_progress(self.console, self.steps, self.step))
            while self.step < self.steps and not self._stops(stop):
                records.append(self.train_step())
                refuse_divergence(records[-1], settings.optimization.learning_rate)
                if log is not None and self.step % settings.logging.every_steps == 0:
                    log.write(records[-1])
                show(records[-1])
                # Before the checkpoint: a run that is killed between the two does this step, and both, again.
                if self._due(settings.validation.every_steps) or self.step == self.steps:
                    self._validate(log)
                if self._due(settings.checkpoints.every_steps):
                    self.checkpoints.save(self.accelerator, self.step)
        self.model.encoder.refuse_moved(since=encoder)
        self.finish(stop.reason)
        return records

    def _validate(self, log: RunLog | None) -> None:
        if self.validation is None:
            return
        with self.backbone_lock:
            losses = self.validation.run(with_memory=self.settings.memory.enabled)
        record = ValidationRecord(self.step, **losses, tokens=self.validation.num_tokens)  # type: ignore[arg-type]
        if log is not None:
            log.write(record)
        shown = ", ".join(f"{system} {loss:.4f}" for system, loss in losses.items() if loss is not None)
        self.console.print(f"validation after step {self.step:,}: {shown}", highlight=False)

    def train_step(self) -> StepRecord:
        """Do one optimizer step and return what happened in it."""
        start, settings = time.perf_counter(), self.settings.optimization
        self.model.train()
        self.model.encoder.refuse_trainable()  # before the backbone runs, which would freeze it again without a word
        first = self.step * settings.gradient_accumulation
        numbers = range(first, first + settings.gradient_accumulation)
        lengths = [self.lanes.lengths(number) for number in numbers]
        scale = self.local_updates.loss_scale(lengths, self.own)
        sums = StepSums()
        for number in numbers:
            sends = number == numbers[-1] and not self.local_updates.enabled  # its gradient to the other processes
            with contextlib.nullcontext() if sends else self.accelerator.no_sync(self.side_network):
                self._window_step(number, scale, sums)
        # Of the network as prepared: FSDP puts parameters of its own in the place of those chosen before.
        weights = [weight for weight in self.side_network.parameters() if weight.requires_grad]
        weights += self.further_parameters
        norm = self.accelerator.clip_grad_norm_(weights, settings.clip_norm)
        learning_rate = float(self.schedule.get_last_lr()[0])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.step += 1
        self.local_updates.after_step(self.step, self.optimizer)
        for each in self.extensions:
            each.after_step()
        return self._record(sums, lengths, float(norm), learning_rate, time.perf_counter() - start)

    def _window_step(self, number: int, scale: float, sums: StepSums) -> None:
        """Forward and backward pass over one window of each own lane, which then enters memory."""
        memory, batch = self.settings.memory, self._batch(number)
        features = self.features.of(batch.input_ids, batch.lengths)
        banks = None
        if memory.enabled:
            growth = (memory.tokens, memory.start_tokens, memory.growth_steps, self.model.config.chunk_size)
            capacity = scheduled_capacity(self.step, *growth)
            self.memories.prepare(batch, number, capacity, self._batch, self._states)
            banks = self.memories.readable(batch)
            sums.memory_tokens += sum(bank.num_tokens for bank in self.memories.banks) / len(self.memories.banks)
        with self.accelerator.autocast():
            hidden_states, reads, _ = self.side_network(features.states, banks)
            own = hidden_states[:, -batch.labels.shape[1] :]  # without the start tokens
            losses = token_losses(self.model, own, batch.labels)
        weights = (batch.labels[:, 1:] != NO_LABEL).float()
        sums.loss += float((losses.detach() * weights).sum())
        sums.backbone_loss += float((features.losses * weights).sum())
        if reads:
            sums.memory_share += float(torch.stack([read.memory_share.mean() for read in reads]).mean())
            sums.reads += 1
        sums.batches += 1
        if self.settings.loss.long_context_weight:
            weights = weights * self._long_context_weights(number, batch, features.losses)
        loss = (losses * weights).sum() * scale
        if not loss.requires_grad:  # gates alone are trained, and memory holds nothing yet
            loss = loss + 0 * sum(weight.sum() for weight in self.trained.values())
        self.accelerator.backward(loss)
        if memory.enabled:
            self.memories.write(batch, features.states)

    @functools.lru_cache(maxsize=4)  # noqa: B019  a trainer lives as long as its run
    def _batch(self, number: int) -> LaneBatch:
        """Return this process's rows of a batch, on its device."""
        return self.lanes.batch(number, self.own).to(self.model.input_device)

    def _states(self, batch: LaneBatch) -> BackboneStates:
        return self.features.of(batch.input_ids, batch.lengths).states

    def _long_context_weights(self, number: int, batch: LaneBatch, local: Tensor) -> Tensor:
        loss = self.settings.loss
        long = local.clone()
        for lane, length in enumerate(batch.lengths):
            context = preceding_tokens(self._batch, number, lane, loss.long_context_tokens - length)
            if len(context) and length > 1:
                long[lane, : length - 1] = self.features.losses_after(context, batch.input_ids[lane, :length])
        return long_context_weights(local, long, loss.long_context_weight)

    def _record(
        self, sums: StepSums, lengths: Sequence[Sequence[int]], norm: float, learning_rate: float, seconds: float
    ) -> StepRecord:
        tokens, targets = sum(map(sum, lengths)), num_targets(lengths)
        values = torch.tensor(dataclasses.astuple(sums), device=self.accelerator.device)
        total = StepSums(*self.accelerator.reduce(values, "sum").tolist())
        loss, backbone_loss = total.loss / targets, total.backbone_loss / targets
        return StepRecord(
            step=self.step,
            epoch=self.step * self.settings.optimization.gradient_accumulation / self.lanes.steps_per_epoch,
            loss=loss,
            backbone_loss=backbone_loss,
            gain=backbone_loss - loss,
            learning_rate=learning_rate,
            gradient_norm=norm,
            tokens=tokens,
            memory_tokens=total.memory_tokens / total.batches,
            memory_share=total.memory_share / total.reads if total.reads else None,
            bias_mean=setup.mean_bias(self.model),
            seconds=seconds,
            tokens_per_second=tokens / seconds,
        )

    def _due(self, every_steps: int) -> bool:
        return every_steps > 0 and self.step % every_steps == 0

    def _stops(self, stop: Interruption) -> bool:
        """Return whether to stop before the next step, where any process wants to: all leave the loop at the same step."""
        if not self.local_updates.agree(self.step):
            return False  # between two averages no process has what all would go on with
        wanted = torch.tensor(float(stop.wanted), device=self.accelerator.device)
        return bool(self.accelerator.reduce(wanted, "sum"))

    def finish(self, reason: str | None) -> None:
        """Save a checkpoint, the side network and the curve; say how to go on if the run was stopped."""
        if self.step:
            self.checkpoints.save(self.accelerator, self.step)
        self.accelerator.wait_for_everyone()
        whole = self.accelerator.get_state_dict(self.side_network)  # also where FSDP has spread tensors over processes
        if not self.accelerator.is_main_process:
            return
        state = {f"side_network.{name}": each for name, each in whole.items()}
        own_backbone = self.model.backbone_was_trained
        self.model.save_pretrained(self.folder / "side-network", state_dict=state, save_backbone=own_backbone)
        if (log := self.folder / "log.jsonl").is_file() and (read := read_log(log)).steps:
            steps, validations = read
            plot_training(self.folder / "curve.png", steps, validations)
        self.console.print(
            f"In {self.folder}: side-network (for `LongMemForCausalLM.from_pretrained`), curve.png, log.jsonl, checkpoints.",
            highlight=False,
            soft_wrap=True,
        )
        if reason is not None:
            self.console.print(f"Stopped by {reason} after step {self.step} of {self.steps}; the same command goes on.")


def refuse_divergence(record: StepRecord, learning_rate: float) -> None:
    """Raise ValueError if a loss or a gradient is no number any more: no later step would repair the weights."""
    if not math.isfinite(record.loss) or math.isnan(record.gradient_norm):
        raise ValueError(
            f"training diverged in step {record.step}: loss {record.loss}, gradient norm {record.gradient_norm}; lower "
            f"`optimization.learning_rate` ({learning_rate}) or `optimization.gate_learning_rate`, and give another `output`."
        )
