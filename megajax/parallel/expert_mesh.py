"""The mesh when experts are laid out otherwise than attention: mesh refinement for MoE folding.

Megatron numbers the devices of a pipeline stage twice: dense layers as (tp, ulysses, cp, dp), experts (etp, ep, edp),
the first named fastest, over the same devices. The products of the sizes cut the line of devices in both ways; where
each cut divides the next, the pieces between them are axes of one mesh, and every dense or expert axis is a tuple of
them. Nothing is ever placed on a second mesh. Source: Megatron's parallel_state.py, and "MoE Parallel Folding"
(arXiv 2504.14960).
"""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
import itertools
from collections.abc import Mapping

from megajax.config import ConfigError

MeshAxes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Refinement:
    """A mesh, and what dense and expert axes span in it.

    sizes: fine axes, outermost first. dense: pp, replica, dp, ep, cp, ulysses, tp; `ep` is the inner part of data
    parallelism that belongs to the expert group, so the batch is always cut over replica, dp and ep. expert: etp, ep,
    edp, and edp contains `replica`. folded: whether the two sides differ from the plain mesh.
    """

    sizes: Mapping[str, int]
    dense: dict[str, MeshAxes]
    expert: dict[str, MeshAxes]
    folded: bool

    @property
    def names(self) -> MeshAxes:
        """Fine axes, outermost first."""
        return tuple(self.sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Their sizes."""
        return tuple(self.sizes.values())


def refine(
    *,
    dp: int,
    tp: int = 1,
    ulysses: int = 1,
    cp: int = 1,
    pp: int = 1,
    replica: int = 1,
    ep: int = 1,
    etp: int | None = None,
    folded: bool | None = None,
) -> Refinement:
    """The mesh of a layout.

    Args:
      dp: all data parallelism of dense layers, `replica` and the part that becomes ep included.
      cp, ulysses: the factors of the context-parallel size, `ulysses` the inner one.
      ep, etp: expert_model_parallel_size and expert_tensor_parallel_size, None for tp.
      folded: True for Megatron's device groups, False for the plain mesh, whose ep is a part of dp. By default plain
        where that is possible (etp = tp, and ep divides dp); group sizes are the same in both, only with cp > 1 do
        the neighbours differ.

    Raises:
      ConfigError: sizes that do not divide one another.
    """
    etp = tp if etp is None else etp
    if dp % replica:
        raise ConfigError(
            f"num_distributed_optimizer_instances={replica} does not divide the data-parallel size {dp};"
            " choose a divisor"
        )
    world = tp * ulysses * cp * dp
    if world % (etp * ep):
        raise ConfigError(
            f"expert_model_parallel_size={ep} times expert_tensor_parallel_size={etp} does not divide the {world}"
            " devices of a pipeline stage; change one of them"
        )
    plain = etp == tp and (dp // replica) % ep == 0
    if folded is False and not plain:
        raise ConfigError(
            f"expert_model_parallel_size={ep} is not a part of the data-parallel size {dp // replica} and tensor"
            f" parallelism {tp} (expert_tensor_parallel_size={etp}); let experts fold over the other axes"
        )
    if plain and not folded:
        return _plain(dp=dp, tp=tp, ulysses=ulysses, cp=cp, pp=pp, replica=replica, ep=ep)
    if world // (etp * ep) % replica:
        raise ConfigError(
            f"num_distributed_optimizer_instances={replica} does not divide the expert-data-parallel size"
            f" {world // (etp * ep)}; choose a divisor"
        )
    return _folded({"tp": tp, "ulysses": ulysses, "cp": cp, "dp": dp // replica, "replica": replica}, pp, ep, etp)


def _plain(*, dp: int, tp: int, ulysses: int, cp: int, pp: int, replica: int, ep: int) -> Refinement:
    sizes = {
        "pp": pp,
        "replica": replica,
        "dp": dp // (replica * ep),
        "ep": ep,
        "cp": cp,
        "ulysses": ulysses,
        "tp": tp,
    }
    expert = {"etp": ("tp",), "ep": ("ep",), "edp": ("replica", "dp", "cp", "ulysses")}
    return Refinement(sizes, {name: (name,) for name in sizes}, expert, folded=False)


def _folded(dense_sizes: Mapping[str, int], pp: int, ep: int, etp: int) -> Refinement:
    """dense_sizes: fastest first."""
    expert_cuts = (etp, etp * ep)
    fine: list[tuple[str, int, int]] = []  # name, start, size; fastest first
    dense: dict[str, MeshAxes] = {}
    start = 1
    for name, size in dense_sizes.items():
        end = start * size
        cuts = sorted({start, *(cut for cut in expert_cuts if start < cut < end), end})
        _check_chain(cuts, name, size, ep, etp)
        pieces = [(low, high // low) for low, high in itertools.pairwise(cuts)]
        if name == "dp":
            # The part inside the expert group is called ep, as in the plain mesh, also where it is all or nothing.
            inner = [piece for piece in pieces if piece[0] < etp * ep]
            outer = [piece for piece in pieces if piece[0] >= etp * ep]
            dense["ep"] = _add(fine, "ep", inner, start)
            dense["dp"] = _add(fine, "dp", outer, end)
        else:
            dense[name] = _add(fine, name, pieces, start)
        start = end
    return Refinement(
        {"pp": pp} | {name: size for name, _, size in reversed(fine)},
        {"pp": ("pp",)} | dict(reversed(dense.items())),
        {
            "etp": _span(fine, 1, etp),
            "ep": _span(fine, etp, etp * ep),
            "edp": _span(fine, etp * ep, start),
        },
        folded=True,
    )


def _add(fine: list[tuple[str, int, int]], name: str, pieces: list[tuple[int, int]], start: int) -> MeshAxes:
    """Names the pieces of a dense axis: `name`, or name0, name1, ... from the outermost. An empty one gets size 1."""
    pieces = pieces or [(start, 1)]
    names = [name] if len(pieces) == 1 else [f"{name}{i}" for i in reversed(range(len(pieces)))]
    fine += [(n, low, size) for n, (low, size) in zip(names, pieces, strict=True)]
    return tuple(reversed(names))


def _span(fine: list[tuple[str, int, int]], low: int, high: int) -> MeshAxes:
    """The fine axes from `low` to `high`, outermost first; none where the two are equal."""
    return tuple(name for name, start, size in reversed(fine) if size > 1 and low <= start < high)


def _check_chain(cuts: list[int], name: str, size: int, ep: int, etp: int) -> None:
    for low, high in itertools.pairwise(cuts):
        if high % low:
            wrong = low if low in (etp, etp * ep) else high
            field = f"expert_tensor_parallel_size={etp}" if wrong == etp else f"expert_model_parallel_size={ep}"
            raise ConfigError(
                f"{field} makes groups of {wrong} devices, which cut {name}={size} (blocks of {cuts[0]} to {cuts[-1]}"
                " devices) unevenly; choose sizes that divide one another, such as powers of two"
            )


def expand(table: Mapping[str, MeshAxes], refinement: Refinement) -> dict[str, MeshAxes]:
    """A table from logical to mesh axes, written for the plain mesh, in fine axes.

    Logical axes whose names begin with `expert` are read on the expert side, where tp means etp, ep the whole expert
    group, and dp means edp without `replica`, cp and ulysses being part of it; all others on the dense side. Without
    folding nothing changes.
    """
    if not refinement.folded:
        return dict(table)
    replica = refinement.dense["replica"]
    expert = refinement.dense | {
        "tp": refinement.expert["etp"],
        "ep": refinement.expert["ep"],
        "dp": tuple(axis for axis in refinement.expert["edp"] if axis not in replica),
        "cp": (),
        "ulysses": (),
    }
    return {logical: _expand(logical, axes, refinement.dense, expert) for logical, axes in table.items()}


def _expand(logical: str, axes: MeshAxes, dense: Mapping[str, MeshAxes], expert: Mapping[str, MeshAxes]) -> MeshAxes:
    side = expert if logical.startswith("expert") else dense
    unknown = [axis for axis in axes if axis not in side]
    if unknown:
        raise ConfigError(f"{logical}: {unknown[0]!r} is not a mesh axis; known: {', '.join(dense)}")
    return tuple(fine for axis in axes for fine in side[axis])
