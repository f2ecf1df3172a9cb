"""Several processes that train one model under torchrun: ranks, exchanges and agreement.

Every rank sees its share of each batch; gradients, counts and decisions are shared, so that all
hold the same weights and take the same steps. Only rank 0 writes files and prints.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import textwrap
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from camoxpert import console, stop
from camoxpert.errors import CamoXpertError, ConfigError, PeerError, Stopped

T = TypeVar("T")

# How long ranks wait while one of them does work for all, such as decoding a data set.
PATIENCE = timedelta(hours=24)


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: number of this process, from 0.
        size: processes in all.
        local_rank, local_size: the same among the processes of this machine.
        patient: process group without the usual time limit, or None.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    patient: Any = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and prints for all."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all processes, on the tensor's own device, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Copy the buffers of rank 0 to all ranks: batch norm statistics differ between ranks."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def gather(self, value: T, *, patiently: bool = False) -> list[T]:
        """Return the values (plain Python) of all ranks, in order.

        Args:
            value: of this rank.
            patiently: wait for up to ``PATIENCE`` instead of the process timeout.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.patient if patiently else None)
        return values

    def from_first(self, call: Callable[[], T]) -> T:
        """Return on every rank what rank 0 computes; an error of rank 0 is raised on all.

        Args:
            call: run on rank 0 only; its result must be picklable.

        Raises:
            CamoXpertError: what ``call`` raised, on every process.
        """
        if self.size == 1:
            return call()
        value, fault = (self._try(call)) if self.first else (None, None)
        self._raise_together(fault)
        sent = [value]
        dist.broadcast_object_list(sent, src=0)
        # Rank 0 sent what ``call`` returned.
        return cast("T", sent[0])

    def in_turn(self, call: Callable[[], T]) -> T:
        """Run ``call`` on all ranks, on the first of each machine before the others.

        The others then find on disk what the first one wrote.

        Raises:
            CamoXpertError: what any of them raised, on every process.
        """
        if self.size == 1:
            return call()
        value: T | None = None
        for turn in (True, False):
            fault = None
            if (self.local_rank == 0) == turn:
                value, fault = self._try(call)
            self._raise_together(fault)
        # None only where T is: a failed call was raised above.
        return cast("T", value)

    def agree_to_stop(self) -> int:
        """Return the exit code that all processes stop with because one was asked to, or 0."""
        request = stop.current()
        return request.agree(self.gather(request.code()))

    def check_stop(self) -> None:
        """Raise Stopped on all processes if one of them was asked to stop."""
        if self.agree_to_stop():
            raise stop.current().stopped()

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return a module whose backward pass averages gradients over the ranks.

        Only parameters that require gradients now take part: wrap again when others do.
        """
        if self.size == 1:
            return model
        device = next(model.parameters()).device
        gc.collect()  # Frees the hooks of an earlier wrapper.
        # Depthwise convolutions give such gradients; a copy of a few kilobytes.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )

    def close(self) -> None:
        """Leave the group."""
        console.set_silent(False)
        if self.size > 1 and dist.is_initialized():
            # This may fail after a peer was lost; it must not hide how the run ended.
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()

    def _try(self, call: Callable[[], T]) -> tuple[T | None, CamoXpertError | Stopped | None]:
        try:
            # A signal may end the call on one rank: _raise_together tells the others.
            with stop.current().undeferred():
                return call(), None
        except (CamoXpertError, Stopped) as error:
            return None, error

    def _raise_together(self, fault: CamoXpertError | Stopped | None) -> None:
        """Raise on all ranks if any of them has an error; ranks without one stay silent."""
        told = None if fault is None else (type(fault), str(fault), fault.exit_code)
        faults = [f for f in self.gather(told, patiently=True) if f is not None]
        if fault is not None:
            # One of several ranks with the same error prints it.
            fault.quiet = faults[0] == told and not self.first and self.local_rank > 0
            raise fault
        if faults:
            kind, text, code = faults[0]
            error = kind(text)
            error.exit_code = code
            error.quiet = True
            raise error


def local_rank() -> int:
    """Return the local rank that torchrun set; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def join(device: str, *, timeout: float) -> World:
    """Join the processes that torchrun started; a world of one without torchrun.

    Args:
        device: the setting: auto, cpu or cuda.
        timeout: seconds that processes wait for each other.

    Raises:
        ConfigError: a device that processes cannot share.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set. Start several processes "
            f"with torchrun: torchrun --standalone --nproc-per-node {size} train_ultimate.py ..."
        )
    on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if ":" in device:
        raise ConfigError(
            f"--device {device}: under torchrun every process takes a device of its own. Use "
            f"--device cuda and choose among them with CUDA_VISIBLE_DEVICES."
        )
    local, local_size = local_rank(), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if on_cuda:
        if local_size > torch.cuda.device_count():
            raise ConfigError(
                f"torchrun started {local_size} processes here and there are "
                f"{torch.cuda.device_count()} CUDA devices. Use --nproc-per-node "
                f"{max(1, torch.cuda.device_count())}, or --device cpu."
            )
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    patience = timedelta(seconds=timeout)
    try:
        found, rank, size = next(iter(rendezvous("env://", timeout=patience)))
        generation = join_generation(found, rank, size, timeout=timeout)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(generation, found),
            rank=rank,
            world_size=size,
            timeout=patience,
        )
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = in_short(error)
        raise PeerError(f"The {size} processes could not find each other: {reason}.") from error
    # Ranks above 0 are silenced here and nowhere else.
    console.set_silent(rank > 0)
    return World(rank, size, local, local_size, patient)


def join_generation(store: dist.Store, rank: int, size: int, *, timeout: float) -> str:
    """Return a name that these processes share with each other and with no earlier ones.

    torchrun keeps its store when it restarts processes. Without a new name they would find the
    addresses of the previous processes there and wait for them; and torchrun's restart count may
    differ between machines. So rank 0 names the generation, the others answer with a token, and the
    name is agreed on once rank 0 has seen all of them.

    Raises:
        RuntimeError: not all ranks answered in time.
    """
    ends = time.monotonic() + timeout
    token = uuid.uuid4().hex
    if rank == 0:
        store.set("life", token)
        answers = [f"{token}/{other}" for other in range(1, size)]
        store.wait(answers, timedelta(seconds=timeout))
        store.set(f"{token}/go", " ".join(store.get(key).decode() for key in answers))
        return token
    seen = ""
    while time.monotonic() < ends:
        life = store.get("life").decode()
        if life != seen:
            seen = life
            store.set(f"{life}/{rank}", token)
        if store.check([f"{life}/go"]) and token in store.get(f"{life}/go").decode():
            return life
        time.sleep(0.02)
    raise RuntimeError("the first process did not answer in time")


@contextmanager
def named_faults(world: World) -> Iterator[None]:
    """Turn a lost connection into a PeerError that explains it.

    Raises:
        PeerError: another process ended or did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or isinstance(error, torch.OutOfMemoryError) or not is_peer_loss(error):
            raise
        reason = in_short(error)
        raise PeerError(
            f"Process {world.rank} of {world.size} stops: another process of this run ended or "
            f"does not answer ({reason}). Its own message says why. The checkpoints already "
            f"written are intact; the same command continues (torchrun --max-restarts N does so "
            f"by itself)."
        ) from error


def in_short(error: BaseException) -> str:
    """Return an error text without paths into torch's sources, at most 120 characters."""
    words = re.sub(r"\[/[^]]*\]", "", str(error))
    return textwrap.shorten(words, 120, placeholder=" ...")


def is_peer_loss(error: RuntimeError) -> bool:
    """Return whether an exception means that gloo or NCCL lost a peer or timed out."""
    # Their errors name their own sources; a kernel that timed out does not.
    words = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in words or "nccl" in words


def restarts_left() -> bool:
    """Return whether torchrun would restart the processes if they failed."""
    count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return count < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def no_sync(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a wrapped module adds up gradients without sharing them."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()
