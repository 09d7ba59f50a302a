"""Mixture: several datasets seen as one, whose samples alternate by weights, exactly.

Always holds: of any first p positions each dataset has had its share of p to within one sample; the row at a position
follows from that position, the datasets, the weights, the seed and the batch alone. Weights are whole numbers, so
nothing drifts however far a run goes. Each dataset keeps epochs of its own. Called where a run opens its training data.

Weights n_1 … n_k with sum T make a pattern of T places, which repeats: dataset d has n_d of them. Its j-th sample
belongs into a window of places, from floor(j T / n_d) to before ceil((j + 1) T / n_d); any order that keeps to the
windows stays within one sample of every share (Baruah, Cohen, Plaxton, Varvel, "Proportionate progress", 1996). Taking
at each place, of the samples whose window has begun, the one whose window ends first keeps to all of them (earliest
deadline first). Rounding p n_d / T for each dataset by itself would not do: the roundings do not add up to p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

from data_pipeline.arrow_files import ArrowFile
from data_pipeline.draws import key64
from data_pipeline.errors import UsageError, UserError
from data_pipeline.manifests import Document, digest_of
from data_pipeline.open_shards import OpenShards
from data_pipeline.order import ALGORITHM, Located, OrderState, SampleOrder
from data_pipeline.shard_reader import ShardReader
from data_pipeline.shards import Dataset

MIXED = f"mixture-1 of {ALGORITHM}"
LONGEST_PATTERN = 100_000  # places: worked out when a run starts, in a quarter of a second


@dataclass(frozen=True)
class MixtureState(OrderState):
    """`datasets`: their ids; `weights`: as the smallest whole numbers. Text, so that it is the same read from JSON."""

    datasets: str
    weights: str


class Mixture(Dataset):
    """Datasets of which a share of the samples is drawn each, in the order given. The shards are those of the first,
    then those of the second, and so on.

    Raises UserError if one dataset comes twice, UsageError if the weights make too long a pattern.
    """

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[Fraction]) -> None:
        self.datasets, self.weights = tuple(datasets), smallest_whole(weights)
        for number, dataset in enumerate(self.datasets):
            for earlier in self.datasets[:number]:
                if earlier.id == dataset.id:
                    found = f"{earlier.uri} and {dataset.uri}"
                    raise UserError(f"dataset {dataset.id[:12]}", "once in a mixture", found, "give it one weight")
        self.id = digest_of([dataset.id for dataset in self.datasets])
        self.rows = sum(dataset.rows for dataset in self.datasets)
        self.shard_rows = tuple(rows for dataset in self.datasets for rows in dataset.shard_rows)
        self.first_shards = np.cumsum([0, *(len(dataset.shard_rows) for dataset in self.datasets)])
        self.cached = True
        self._families = {}
        self.shard = OpenShards(self._open_shard)  # the only readers that are kept: the datasets open each anew

    @property
    def uri(self) -> str:
        return " ".join(dataset.uri for dataset in self.datasets)

    @property
    def distant(self) -> bool:
        return any(dataset.distant for dataset in self.datasets)

    def order(self, seed: int, batch: int) -> SampleOrder:
        return MixtureOrder(self, seed, batch)

    def families(self) -> tuple[str, ...]:
        return tuple(sorted(set.intersection(*(set(dataset.families()) for dataset in self.datasets))))

    def family_manifest(self, family: str) -> Document:
        """What the datasets' manifests say alike. Raises UserError as for each of them, and if the values of one are
        made differently."""
        if family not in self._families:
            first, *others = (dataset.family_manifest(family) for dataset in self.datasets)
            for dataset, other in zip(self.datasets[1:], others, strict=True):
                for key in ("schema", "producer"):
                    if other[key] != first[key]:
                        name = f"dataset {dataset.id[:12]} family {family}"
                        expected = f"{key} {first[key]} as in {self.datasets[0].id[:12]}"
                        raise UserError(name, expected, str(other[key]), "build or enrich both with one version")
            self._families[family] = {key: first[key] for key in ("family", "schema", "producer")}
        return self._families[family]

    def shard_file(self, family: str, index: int) -> ArrowFile:
        dataset, inner = self._member(index)
        return dataset.shard_file(family, inner)

    def shard_bytes(self, family: str, index: int) -> int:
        """Size of a shard in the cache, where those of a folder are not."""
        dataset, inner = self._member(index)
        return dataset.shard_bytes(family, inner) if dataset.distant else 0

    def fetch(self, family: str, index: int) -> str | None:
        dataset, inner = self._member(index)
        return dataset.fetch(family, inner) if dataset.distant else None

    def shard_label(self, index: int) -> tuple[str, str]:
        dataset, inner = self._member(index)
        return dataset.shard_label(inner)

    def _open_shard(self, family: str, index: int) -> ShardReader:
        dataset, inner = self._member(index)
        dataset.cached = self.cached
        return dataset._open_shard(family, inner)

    def _member(self, shard: int) -> tuple[Dataset, int]:
        number = int(np.searchsorted(self.first_shards, shard, side="right")) - 1
        return self.datasets[number], shard - int(self.first_shards[number])


class MixtureOrder(SampleOrder):
    """The order of a mixture: the pattern chooses the dataset, the dataset's own endless SampleOrder the row.

    Where a dataset's share of a global batch is a whole number, that is the batch of its order: a rank then stays in
    the same lanes of every dataset, as it does in a single one. Where it is not, the places of a dataset wander through
    the global batch and with them every rank through all lanes; so its order has a batch of 1, which is one lane, and
    all ranks read the same few shards at a time.

    Raises UserError if a dataset cannot fill its share of a global batch.
    """

    def __init__(self, mixture: Mixture, seed: int, batch: int) -> None:
        super().__init__(mixture.id, mixture.shard_rows, seed, batch)
        self.mixture = mixture
        self.pattern = pattern_of(mixture.weights)
        self.counts = np.asarray(mixture.weights, np.int64)
        self.earlier = np.empty_like(self.pattern)  # places of the same dataset before, in the pattern
        for number, count in enumerate(mixture.weights):
            self.earlier[self.pattern == number] = np.arange(count)
        self.orders = [
            SampleOrder(dataset.id, dataset.shard_rows, key64("mixture", seed, dataset.id), self._batch_of(weight))
            for dataset, weight in zip(mixture.datasets, mixture.weights, strict=True)
        ]

    def _batch_of(self, weight: int) -> int:
        share, rest = divmod(self.batch * weight, len(self.pattern))
        return 1 if rest else share

    def state(self, position: int) -> OrderState:
        weights = ":".join(map(str, self.mixture.weights))
        datasets = " ".join(dataset.id for dataset in self.mixture.datasets)
        return MixtureState(self.dataset_id, MIXED, self.seed, self.batch, self.lanes, position, datasets, weights)

    def _locate(self, positions: NDArray[np.int64]) -> Located:
        datasets, own_positions = self.split(positions)
        shards, rows = np.empty_like(positions), np.empty_like(positions)
        for number, order in enumerate(self.orders):
            chosen = np.flatnonzero(datasets == number)
            own_shards, rows[chosen] = order.rows_at(own_positions[chosen])
            shards[chosen] = own_shards + self.mixture.first_shards[number]
        return shards, rows

    def split(self, positions: NDArray[np.int64]) -> Located:
        """(number of the dataset, position in its own order) of global positions, each int64 [n]."""
        rounds = positions // len(self.pattern)
        places = positions - rounds * len(self.pattern)
        datasets = self.pattern[places]
        return datasets, rounds * self.counts[datasets] + self.earlier[places]


def smallest_whole(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """The smallest whole numbers in the ratio of positive weights.

    Raises UsageError if their sum, which is the length of the pattern, is too large.
    """
    common = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * common) for weight in weights]
    divisor = math.gcd(*whole)
    smallest = tuple(number // divisor for number in whole)
    if sum(smallest) > LONGEST_PATTERN:
        raise UsageError(
            "weights of a mixture",
            f"a sum of at most {LONGEST_PATTERN} as the smallest whole numbers",
            ":".join(map(str, smallest)),
            "round them to fewer digits",
        )
    return smallest


def pattern_of(weights: Sequence[int]) -> NDArray[np.int64]:
    """The dataset of each of the sum(weights) places; see the file's opening. Ties go to the earlier dataset."""
    places = sum(weights)
    to_come = [(0, number) for number in range(len(weights))]  # (place at which the next sample's window begins, …)
    heapify(to_come)
    begun: list[tuple[int, int]] = []  # (place before which the next sample must come, dataset)
    taken = [0] * len(weights)
    pattern = np.empty(places, np.int64)
    for place in range(places):
        while to_come and to_come[0][0] <= place:
            _, number = heappop(to_come)
            heappush(begun, (-(-(taken[number] + 1) * places // weights[number]), number))
        _, number = heappop(begun)
        pattern[place] = number
        taken[number] += 1
        if taken[number] < weights[number]:
            heappush(to_come, (taken[number] * places // weights[number], number))
    return pattern
