"""The processes that train together, as torchrun starts them: who they are, and how they talk.

What they say to each other are a few numbers and Python objects between steps, and rows and
gradients in them. A process that ends, for whatever reason, ends the others within a minute, with a
message that names it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from groupsae.errors import InputError, Interrupted

_BEAT = 2.0  # seconds between two signs of life
_SILENCE = 40.0  # after which a process counts as gone
# Whoever waits, waits long: for an evaluation, say. That another is gone the heart beats tell.
_PATIENCE = timedelta(days=30)
_ENDED = 70  # exit code of a process whose partner is gone: EX_SOFTWARE


class Team:
    """The processes of one training, each with its rank; one alone where torchrun started none.

    All of them call the same methods in the same order.

    Attributes:
        rank: Of this process, from 0.
        size: How many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this one writes what is written once."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on when all are here."""
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        """What each process has, by rank: anything that JSON holds. All are given all of it."""
        if self.size == 1:
            return [value]
        own = _as_bytes(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(own)]))
        longest = int(torch.cat(sizes).max())
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(own)] = own
        given = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(given, padded)
        return [_value(one[: int(n)]) for one, n in zip(given, sizes, strict=True)]

    def share(self, value: Any) -> Any:
        """What the first process has, for all: anything that JSON holds."""
        if self.size == 1:
            return value
        own = _as_bytes(value)
        size = torch.tensor([len(own)])
        dist.broadcast(size, src=0)
        given = own if self.first else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(given, src=0)
        return _value(given)

    def share_tensor(self, tensor: Tensor) -> None:
        """Fill a tensor of the same shape everywhere with the first process's."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def largest(self, *numbers: int) -> list[int]:
        """Of several numbers, each process has its own, the largest of each."""
        if self.size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        largest: list[int] = tensor.tolist()
        return largest

    def groups(self, members: Sequence[Sequence[int]]) -> list[dist.ProcessGroup | None]:
        """Process groups for sums within some ranks; None for those of one rank."""
        return [
            dist.new_group(list(ranks), timeout=_PATIENCE) if len(ranks) > 1 else None
            for ranks in members
        ]

    def exchange(
        self, sending: Sequence[tuple[int, Tensor]], receiving: Sequence[tuple[int, Tensor]]
    ) -> None:
        """Send tensors to other ranks and receive some into others; in the same order on both."""
        talk = [dist.P2POp(dist.isend, tensor, rank) for rank, tensor in sending]
        talk += [dist.P2POp(dist.irecv, tensor, rank) for rank, tensor in receiving]
        if talk:
            for work in dist.batch_isend_irecv(talk):
                work.wait()


@contextmanager
def team() -> Iterator[Team]:
    """The team that torchrun has started this process in; a team of one without torchrun.

    Raises:
        InputError: torchrun's environment is not whole.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team()
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE={size}: {', '.join(missing)} is not set; start several processes by "
            "torchrun --nproc-per-node N --module groupsae"
        )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group(backend, timeout=_PATIENCE)
    made = Team(dist.get_rank(), dist.get_world_size())
    heart = _Heart(made)
    heart.start()
    try:
        yield made
    except RuntimeError as error:
        heart.end_with_partners()
        heart.say_why(error)
        raise
    except BaseException as error:
        heart.say_why(error)
        if isinstance(error, InputError | Interrupted) and heart.first_says(error):
            time.sleep(2 * _BEAT)  # torchrun ends all when one has ended: the first is to speak
            sys.exit(error.exit_code)
        raise
    else:
        made.wait()
    finally:
        heart.stop()
        gc.collect()  # a process group that something still refers to may not be ended after this
        with contextlib.suppress(RuntimeError):  # of partners that are gone
            dist.destroy_process_group()


def _as_bytes(value: Any) -> Tensor:
    """JSON, not pickle: nothing that comes from another machine is ever run."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _value(data: Tensor) -> Any:
    return json.loads(bytes(data.numpy()))


class _Heart(threading.Thread):
    """Gives signs of life to the others, listens for theirs, and ends the process without one."""

    def __init__(self, team: Team) -> None:
        super().__init__(name="groupsae-heart", daemon=True)
        self._team = team
        self._store = dist.distributed_c10d._get_default_store()
        self._stopped = threading.Event()
        self._beats = 0
        self._seen: dict[int, tuple[str, float]] = {}

    def run(self) -> None:
        while not self._stopped.wait(_BEAT):
            try:
                self._beat()
            except Exception:  # the store is gone, and with it torchrun or the first process
                if not self._stopped.is_set():
                    self._end("the process that holds the team together is gone")
                return

    def say_why(self, error: BaseException) -> None:
        """Let the others know what this process ends with."""
        with contextlib.suppress(Exception):
            said = f"{_whereabouts()}: {_in_words(error)}"
            self._store.set(f"groupsae/ended/{self._team.rank}", said)

    def first_says(self, error: BaseException) -> bool:
        """Whether the first process ends with the same words, so that this one need not say them.

        Where all meet the same error it does within a moment.
        """
        with contextlib.suppress(Exception):
            until = time.monotonic() + 2 * _BEAT
            while not self._team.first and time.monotonic() < until:
                if said := self._said("ended/0"):
                    return said.endswith(_in_words(error))
                time.sleep(0.1)
        return False

    def end_with_partners(self) -> None:
        """End the process if another is gone, which is why talking to it failed."""
        with contextlib.suppress(Exception):
            before = self._signs()
            time.sleep(2.5 * _BEAT)
            signs = self._signs()
            for rank in range(self._team.size):
                gone = rank != self._team.rank and signs[rank] == before[rank]
                why = self._said(f"ended/{rank}")
                if gone or why:
                    where = signs[rank].rpartition(" ")[0] or "never heard of"
                    self._end(f"rank {rank} ({where}) is gone" + (f": {why}" if why else ""))

    def stop(self) -> None:
        self._stopped.set()
        self.join(60)  # a thread that outlives the interpreter can bring it down

    def _beat(self) -> None:
        self._beats += 1
        own = f"{_whereabouts()} {self._beats}"
        self._store.set(f"groupsae/alive/{self._team.rank}", own)
        for rank, sign in enumerate(self._signs()):
            if rank == self._team.rank:
                continue
            if why := self._said(f"ended/{rank}"):
                self._stopped.wait(5 * _BEAT)  # this one may be about to end by itself, and to say
                if not self._stopped.is_set():
                    self._end(f"rank {rank} is gone: {why}")
            before, since = self._seen.get(rank, ("", 0.0))
            if rank not in self._seen or before != sign:
                self._seen[rank] = sign, time.monotonic()
            elif time.monotonic() - since > _SILENCE:
                where = sign.rpartition(" ")[0] or "never heard of"
                self._end(f"rank {rank} ({where}) gives no sign of life")

    def _signs(self) -> list[str]:
        """The last sign of life of each process."""
        return [self._said(f"alive/{rank}") for rank in range(self._team.size)]

    def _said(self, key: str) -> str:
        """What was left under a key; nothing where nothing was."""
        if not self._store.check([f"groupsae/{key}"]):
            return ""
        return bytes(self._store.get(f"groupsae/{key}")).decode(errors="replace")

    def _end(self, why: str) -> None:
        sys.stderr.write(
            f"groupsae: rank {self._team.rank} ends: {why}; what is finished is kept, and the same "
            "command goes on from the newest checkpoint\n"
        )
        sys.stderr.flush()
        os._exit(_ENDED)  # the main thread may wait for the lost one for ever


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


def _whereabouts() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
