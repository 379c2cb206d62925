"""How long a compiled program would take if everything ran at the peak rates of a data sheet: a bound, no measurement.

    an operation      max(FLOPs / peak, bytes of memory it reads and writes / bandwidth)
    a collective      bytes that a ring sends / rate of the link, NVLink inside a node, network cards between nodes
    the program       its instructions one after another, as XLA scheduled them; between the start and the end of an
                      asynchronous collective the operations go on, and only what is left of it then is waited for

The text of a compiled program is all that is read (`megajax.parallel.hlo`).
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from megajax.ops.grouped_spans import SPANS
from megajax.parallel.aot import GPUS_PER_NODE, Target
from megajax.parallel.census import Collective, Kind, collective_of, kind_of
from megajax.parallel.hlo import Instruction, Where, bytes_of, computations_of
from megajax.parallel.kernel_calls import (
    RERUN,
    SCALED_BLOCKS,
    BlocksOf,
    executed_flops,
    kernel_name,
    recomputed_share,
    rows_of_groups,
    told,
)

_FREE = frozenset({
    *("parameter", "constant", "iota", "partition-id", "replica-id"),
    *("tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all", "add-dependency", "domain"),
    *("copy-start", "copy-done", "async-done", "async-update", "send-done", "recv", "recv-done"),
})  # fmt: skip
"""What takes no time of the compute units: names for what is there already, or copies that run beside."""


_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}
"""What writes a part of its first operand: which operand says what is written."""


class Transfer(NamedTuple):
    """A collective in the schedule of a program. times: its executions; all seconds are of these together.

    covered: operations that run between its start and its end; 0 for a synchronous one. exposed: what is waited for.
    network: whether it leaves the node.
    """

    collective: Collective
    times: float
    asynchronous: bool
    network: bool
    seconds: float
    covered: float
    exposed: float

    @property
    def sent(self) -> float:
        """Bytes."""
        return self.collective.bytes_sent * self.times

    def scaled(self, share: float) -> Transfer:
        """Of so many of its executions."""
        return self._replace(
            times=self.times * share,
            seconds=self.seconds * share,
            covered=self.covered * share,
            exposed=self.exposed * share,
        )


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a run of the program takes on one device.

    Attributes:
      seconds: the whole.
      compute: of that, operations; the rest waits for collectives.
      flops: of matrix products and attention kernels that a device executes; the mean of devices that differ.
      recomputed: of these, what the backward pass does a second time.
      transfers: the collectives.
      kernels: number of executions of hand-written kernels and library calls by name.
    """

    seconds: float
    compute: float
    flops: float
    recomputed: float
    transfers: tuple[Transfer, ...]
    kernels: Mapping[str, float]

    @property
    def exposed(self) -> float:
        """Seconds of waiting."""
        return self.seconds - self.compute


class Taken(NamedTuple):
    """How often something runs that not all devices run: mean over the devices, and on the one that runs it most."""

    mean: float
    most: float


def estimate(
    hlo_text: str,
    mesh: Mesh,
    target: Target,
    busy: float | None = None,
    *,
    turns: int = 1,
    blocks_of: BlocksOf | None = None,
    taken: Mapping[str, Taken] | None = None,
) -> Estimate:
    """Reads a compiled program for the devices of `mesh`, of the kind `target`.

    Args:
      busy: how often conditionals in loops, of two branches and without a name, take the longer one, all devices alike.
        None: always, as all others do.
      turns: of loops whose number of turns is known at run time only; but one of those over spans of experts' rows
        (`megajax.ops.grouped_spans`), which have room for what a router that balances gives.
      blocks_of: how much grouped kernels do; `turns` blocks by default.
      taken: of conditionals by their name (`megajax.parallel.skipped`) how often the longer branch runs, whatever
        `busy` says, and of loops of one turn or none (`megajax.parallel.branch_check`) how often they do. The others
        wait for the device that runs it most. Of four branches, for two such conditionals side by side
        (`megajax.parallel.side_by_side`), each is taken so often.

    Raises:
      ValueError: the text is not that of a compiled program.
    """
    computations, entry = computations_of(hlo_text)
    blocks_of = blocks_of or (lambda rows: turns)
    program = _Program(computations, mesh, target, busy, turns, blocks_of, taken or {})
    run = program.run(entry, Where())
    return Estimate(run.clock, run.compute, run.flops, run.recomputed, tuple(program.transfers), program.kernels)


@dataclasses.dataclass
class _Run:
    """The state of a walk through one computation: seconds since its start."""

    clock: float = 0.0
    compute: float = 0.0
    flops: float = 0
    recomputed: float = 0

    def add(self, other: _Run, times: float = 1) -> None:
        self.clock += times * other.clock
        self.compute += times * other.compute
        self.flops += times * other.flops
        self.recomputed += times * other.recomputed


class _Branch(NamedTuple):
    """What one branch of a conditional does where it is taken."""

    run: _Run
    transfers: list[Transfer]
    kernels: dict[str, float]


class _Pending(NamedTuple):
    """A collective that has started: when, and when its link is done with it."""

    collective: Collective
    network: bool
    seconds: float
    compute: float
    ends: float


class _Program:
    def __init__(
        self,
        computations: Mapping[str, list[Instruction]],
        mesh: Mesh,
        target: Target,
        busy: float | None,
        turns: int,
        blocks_of: BlocksOf,
        taken: Mapping[str, Taken],
    ) -> None:
        self.computations, self.mesh, self.target, self.busy = computations, mesh, target, busy
        self.turns, self.blocks_of, self.taken = turns, blocks_of, taken
        self.mesh_shape = tuple(mesh.shape.items())
        self.transfers: list[Transfer] = []
        self.kernels: dict[str, float] = {}

    def run(self, name: str, where: Where) -> _Run:
        """One execution of a computation; its collectives are noted with all the executions that `where` tells of."""
        run, pending, free, longest = _Run(), {}, {False: 0.0, True: 0.0}, _Run()
        for instruction in self.computations[name]:
            opcode = instruction.opcode
            if opcode.endswith("-done") and instruction.operands and instruction.operands[0] in pending:
                self._end(pending.pop(instruction.operands[0]), run, where)
                continue
            started = self._collective(instruction, where)
            if started is not None:
                collective, network, seconds = started
                begins = max(run.clock, free[network])  # a link does one thing after the other
                free[network] = begins + seconds
                entry = _Pending(collective, network, seconds, run.compute, begins + seconds)
                if _is_synchronous(instruction):
                    self._end(entry, run, where, asynchronous=False)
                else:
                    pending[instruction.name] = entry
            elif (share := self._once_if(instruction)) is not None:
                longest = self._run_once_if(instruction, share, run, longest, where)
            elif opcode == "while":
                trips = 1 if instruction.op_name.endswith(f"{SPANS}/while") else instruction.trips
                inside = where._replace(loops=(*where.loops, trips))
                for called in instruction.called:
                    turn = self.run(called, inside)
                    if RERUN in instruction.op_name:  # a body that loops share is named after one of them
                        turn.recomputed = turn.flops
                    run.add(turn, trips or self.turns)
            elif opcode == "conditional":
                run.add(self._conditional(instruction, where))
            elif opcode == "call":
                for called in instruction.called:
                    run.add(self.run(called, where))
            elif opcode not in _FREE and not opcode.endswith(("-done", "-update")):
                self._operate(instruction, run, where)
        return run

    def _once_if(self, instruction: Instruction) -> Taken | None:
        """How often a loop of one turn or none runs."""
        if instruction.opcode != "while" or instruction.trips is not None:
            return None
        *_, name, last = ("", *instruction.op_name.split("/"))
        return self.taken.get(name) if last == "while" else None

    def _run_once_if(self, instruction: Instruction, share: Taken, run: _Run, longest: _Run, where: Where) -> _Run:
        """Adds a loop of one turn or none to `run`. Of several in a computation a device runs one, and devices wait for
        that which has the longest. longest: of those before this one; returns it with this one."""
        turn = _Run()
        for called in instruction.called:
            turn.add(self.run(called, where._replace(share=share.mean * where.share)))
        run.flops += share.mean * turn.flops
        run.recomputed += share.mean * turn.recomputed
        if turn.clock * share.most <= longest.clock:
            return longest
        run.clock += turn.clock * share.most - longest.clock
        run.compute += turn.compute * share.most - longest.compute
        return dataclasses.replace(turn, clock=turn.clock * share.most, compute=turn.compute * share.most)

    def _conditional(self, instruction: Instruction, where: Where) -> _Run:
        """A conditional as it runs on average."""
        branches = [self._branch(called, where._replace(conditional=True)) for called in instruction.called]
        longest = max(range(len(branches)), key=lambda i: branches[i].run.clock)
        shares, most = self._shares(instruction, len(branches), longest, where)
        for branch, share in zip(branches, shares, strict=True):
            self.transfers += [transfer.scaled(share) for transfer in branch.transfers]
            for name, times in branch.kernels.items():
                self.kernels[name] = self.kernels.get(name, 0) + times * share
        mean, busiest = _Run(), _Run()
        for branch, share in zip(branches, shares, strict=True):
            mean.add(branch.run, share)
        busiest.add(branches[longest].run, most)
        if len(shares) == 2 and shares[longest] == most:
            return mean
        return dataclasses.replace(busiest, flops=mean.flops, recomputed=mean.recomputed)

    def _shares(
        self, instruction: Instruction, branches: int, longest: int, where: Where
    ) -> tuple[tuple[float, ...], float]:
        """(how often each branch runs on average, how often the longest on the device that others wait for)."""
        path = instruction.op_name.split("/")
        taken = next((taken for name, taken in self.taken.items() if name in path), None)
        if taken is not None and branches == 4:
            pair = 1 - taken.mean, taken.mean
            return tuple(mine * its for mine in pair for its in pair), taken.most
        mean = 1.0
        if branches == 2 and taken is not None:
            mean = taken.mean
        elif branches == 2 and where.loops and self.busy is not None:
            mean = self.busy
        shares = tuple(mean if i == longest else (1 - mean) / (branches - 1) for i in range(branches))
        return shares, mean if taken is None else taken.most

    def _branch(self, name: str, where: Where) -> _Branch:
        """One branch by itself."""
        saved = self.transfers, self.kernels
        self.transfers, self.kernels = [], {}
        branch = _Branch(self.run(name, where), self.transfers, self.kernels)
        self.transfers, self.kernels = saved
        return branch

    def _times(self, where: Where) -> float:
        """How often an instruction runs in a step."""
        return where.share * math.prod(trips or self.turns for trips in where.loops)

    def _end(self, pending: _Pending, run: _Run, where: Where, *, asynchronous: bool = True) -> None:
        waited = max(0.0, pending.ends - run.clock)
        times = self._times(where)
        covered = run.compute - pending.compute
        run.clock += waited
        seconds = (times * each for each in (pending.seconds, covered, waited))
        self.transfers.append(Transfer(pending.collective, times, asynchronous, pending.network, *seconds))

    def _operate(self, instruction: Instruction, run: _Run, where: Where) -> None:
        work = [(inner, executed_flops(inner, self.blocks_of)) for inner in self._inside(instruction)]
        flops = sum(count for _, count in work)
        seconds = max(flops / self._peak(instruction), self._traffic(instruction) / self.target.bandwidth)
        run.clock += seconds
        run.compute += seconds
        run.flops += flops
        run.recomputed += sum(count * recomputed_share(inner) for inner, count in work if count)
        kernel = kernel_name(instruction)
        if kernel is not None:
            times = self._times(where)
            self.kernels[kernel] = self.kernels.get(kernel, 0) + times

    def _collective(self, instruction: Instruction, where: Where) -> tuple[Collective, bool, float] | None:
        """(the collective that an instruction runs or starts, whether it leaves the node, its seconds)."""
        found, kind = instruction, kind_of(instruction)
        if kind is None and instruction.opcode == "async-start":
            for inner in (i for called in instruction.called for i in self.computations[called]):
                found, kind = (inner, kind_of(inner)) if kind is None else (found, kind)
        if kind is None:
            return None
        collective = collective_of(kind, found, where, self.mesh_shape)
        per_node = _members_of_a_node(self.mesh, collective.axes)
        network = collective.group_size > per_node
        return collective, network, collective_seconds(collective, per_node, self.target)

    def _inside(self, instruction: Instruction) -> Iterable[Instruction]:
        if instruction.opcode != "fusion":
            return (instruction,)
        return (inner for called in instruction.called for inner in self.computations[called])

    def _peak(self, instruction: Instruction) -> float:
        """fp8 counts where both operands of a product are fp8; anything else runs at the rate of bf16."""
        products = [inner for inner in self._inside(instruction) if inner.opcode == "dot"]
        if any(call in instruction.attributes for call in ("__cublas$lt$matmul$f8", SCALED_BLOCKS)) or (
            products and all(read.shape.startswith("f8") for product in products for read in product.reads[:2])
        ):
            return self.target.fp8 or self.target.bf16
        # A kernel of our own reads fp8 only to multiply it as it is.
        ours = told(instruction, "flops") or told(instruction, "flops_a_row")
        if ours and any(read.shape.startswith("f8") for read in instruction.reads):
            return self.target.fp8 or self.target.bf16
        return self.target.bf16

    def _traffic(self, instruction: Instruction) -> int:
        """Bytes read and written. Of an array of which a slice is read, or is written in place, that slice."""
        if instruction.opcode == "fusion":
            [called] = instruction.called
            return _traffic_of_fusion(tuple(self.computations[called]))
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * bytes_of(instruction.shape)
        if instruction.opcode in _IN_PLACE:
            return 2 * bytes_of(instruction.reads[_IN_PLACE[instruction.opcode]].shape)
        rows = rows_of_groups(instruction, self.blocks_of)
        if rows is not None:
            return rows * told(instruction, "bytes_a_row") + told(instruction, "bytes_besides")
        if instruction.opcode in ("broadcast", "rng-bit-generator"):
            return bytes_of(instruction.shape)
        return bytes_of(instruction.shape) + sum(bytes_of(read.shape) for read in instruction.reads)


def _traffic_of_fusion(body: tuple[Instruction, ...]) -> int:
    users: dict[str, list[Instruction]] = {}
    for instruction in body:
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)

    def read(instruction: Instruction) -> int:
        """Bytes of it that its users want."""
        wanted = 0
        for user in users.get(instruction.name, ()):
            if user.opcode == "bitcast":
                wanted += read(user)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == instruction.name:
                wanted += bytes_of(user.shape)
            elif user.opcode in _IN_PLACE and user.operands[0] == instruction.name:
                # A scatter adds to what is there.
                wanted += bytes_of(user.reads[_IN_PLACE["scatter"]].shape) if user.opcode == "scatter" else 0
            else:
                return bytes_of(instruction.shape)
        return min(wanted, bytes_of(instruction.shape))

    def written(instruction: Instruction) -> int:
        if instruction.opcode == "tuple":
            return sum(written(part) for part in instruction.reads)
        if instruction.opcode == "bitcast":
            return written(instruction.reads[0])
        if instruction.opcode in _IN_PLACE:
            return bytes_of(instruction.reads[_IN_PLACE[instruction.opcode]].shape)
        return bytes_of(instruction.shape)

    return sum(read(i) for i in body if i.opcode == "parameter") + written(body[-1])


def _is_synchronous(instruction: Instruction) -> bool:
    """Whether nothing runs beside it: it has no end of its own, or XLA says so."""
    return not instruction.opcode.endswith("-start") or '"is_sync":true' in instruction.attributes


@functools.cache
def _node_ids(mesh: Mesh) -> np.ndarray:
    return np.vectorize(lambda device: device.id // GPUS_PER_NODE, otypes=[int])(mesh.devices)


def _members_of_a_node(mesh: Mesh, axes: tuple[str, ...] | None) -> int:
    """How many devices of a group along these axes share a node, at the least; None: all axes."""
    names = mesh.axis_names
    inside = [dim for dim, name in enumerate(names) if axes is None or name in axes]
    nodes = np.moveaxis(_node_ids(mesh), inside, range(-len(inside), 0)) if inside else _node_ids(mesh)[..., None]
    groups = nodes.reshape(-1, math.prod(mesh.devices.shape[dim] for dim in inside) if inside else 1)
    return min(int(np.unique(group, return_counts=True)[1].min()) for group in groups)


_RING: frozenset[Kind] = frozenset({"all-reduce", "all-gather", "reduce-scatter"})


def collective_seconds(collective: Collective, per_node: int, target: Target) -> float:
    """Of one execution, among a group of which `per_node` devices share a node; each device has its network card.

    A ring enters and leaves a node once, over all cards of its members together. In an exchange each device sends what
    is for other nodes over its own card.
    """
    n, sent = collective.group_size, collective.bytes_sent
    if n <= per_node:
        return sent / target.nvlink
    if collective.kind in _RING:
        nodes = n / per_node
        between = sent / ((n - 1) / n) * ((nodes - 1) / nodes) / per_node
    elif collective.kind in ("collective-permute", "collective-broadcast"):
        between = sent
    else:
        between = sent / ((n - 1) / n) * (n - per_node) / n
    return max(between / target.network, sent / target.nvlink if per_node > 1 else 0.0)
