#!/usr/bin/env python3
"""Label transfer: our use of FAISS beside scikit-learn's, FAISS's flat index and PyNNDescent, interleaved in one process.

    python benchmarks/transfer.py [--references 1000000] [--queries 100000] [--neighbors 50] [--threads 2] [--rounds 3]
                                  [--data mixture30,mixture10,noise30,real] [--exact] [--latent latent.npy --labels labels.npy]

scArches searches with scikit-learn by brute force, scvi-tools and the HLCA's users with PyNNDescent. Each peer finds the
neighbours, and the same rule makes labels of them. Time is that of the index and the search together, in seconds of the
wall and of the processor (all threads); ratios are told of both, as medians over the rounds. Peers that take too long
are given fewer cells (`--few`) or query cells (`--some`), and then so are we, in the same round.

`mixture` has 60 types of very unequal size, each a cloud of 5 dimensions in noise; `noise` is one round cloud, in which
no method can leave anything out. FAISS multiplies matrices from some 4,300 query cells on, in 30 dimensions. `real` takes a model's latents (reference/latent.npy of a bundle) and makes of them as
many cells as asked for: each at a random place between a cell and one of its 15 nearest, with noise of a tenth of their
distance.

`recall` is the share of the true neighbours that was found; `other labels` is the share of query cells with another label
than that of the true neighbours, `uncertainty` the largest difference. Truth: all pairs in float64, of 300 query cells.
Beside it stands what our search says of itself: lists looked at (nprobe; 0: all pairs) and recall on its own sample.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

from scviaduct.distributed.knn import CellIndex, Probe
from scviaduct.distributed.transfer import kernel

TRUE = 300
Found = tuple[NDArray[np.float64], NDArray[np.int64]]
Search = Callable[[NDArray[np.float32], NDArray[np.float32]], Found]


def main() -> None:
    options = parsed()
    faiss.omp_set_num_threads(options.threads)
    warm_up(options)
    for name in options.data.split(","):
        compare(name, options)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=100_000)
    parser.add_argument("--few", type=int, default=50_000, help="references for PyNNDescent")
    parser.add_argument("--some", type=int, default=5000, help="query cells for searches by brute force")
    parser.add_argument("--neighbors", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", default="mixture30,mixture10,noise30")
    parser.add_argument("--latent", type=Path, help="real latents (cells, dimensions)")
    parser.add_argument("--labels", type=Path, help="their labels")
    parser.add_argument("--peers", default="sklearn,flat,pynndescent")
    parser.add_argument("--exact", action="store_true", help="ours computes all pairs")
    return parser.parse_args()


def warm_up(options: argparse.Namespace) -> None:
    """Compile PyNNDescent before a clock runs."""
    cells = np.random.default_rng(0).normal(size=(3000, 10)).astype(np.float32)
    if "pynndescent" in options.peers:
        pynndescent(options)(cells, cells[:100])


def compare(name: str, options: argparse.Namespace) -> None:
    reference, codes, query = made(name, options)
    some, few = slice(options.some), slice(options.few)
    truth = by_force(reference, query[:TRUE], options.neighbors)
    sizes = {  # peer: references and query cells that it is given
        "sklearn": (reference, query[some]),
        "flat": (reference, query[some]),
        "pynndescent": (reference[few], query[: options.few // 10]),
    }
    print(f"{name}: {len(reference):,} references, {len(query):,} query cells", flush=True)
    probes: list[Probe] = []
    found, seconds = timed(ours(options, probes), reference, query)
    tell("ours", seconds, found, truth, codes, f"  {probes[0]}")
    for peer in filter(None, options.peers.split(",")):
        cells, asked = sizes[peer]
        times: dict[str, list[NDArray[np.float64]]] = {"ours": [], peer: []}
        for _ in range(options.rounds):
            for who, search in (("ours", ours(options)), (peer, PEERS[peer](options))):
                found, seconds = timed(search, cells, asked)
                times[who].append(seconds)
        own, theirs = (np.median(times[who], axis=0) for who in ("ours", peer))
        wall, cpu = np.median(np.divide(times[peer], times["ours"]), axis=0)
        note = (
            f"  on {len(cells):,} x {len(asked):,}, ours {own[0]:.2f} s ({own[1]:.2f} CPU-s):"
            f" {wall:.1f} times our time, {cpu:.1f} times our CPU time"
        )
        known = truth if cells is reference else by_force(cells, asked[:TRUE], options.neighbors)
        tell(peer, theirs, found, known, codes, note)


def timed(
    search: Search, reference: NDArray[np.float32], query: NDArray[np.float32]
) -> tuple[Found, NDArray[np.float64]]:
    """What was found, and seconds of the wall and of the processor."""
    begin = np.array([time.perf_counter(), time.process_time()])
    found = search(reference, query)
    return found, np.array([time.perf_counter(), time.process_time()]) - begin


def tell(
    who: str,
    seconds: NDArray[np.float64],
    found: Found,
    truth: Found,
    codes: NDArray[np.int64],
    note: str = "",
) -> None:
    n = len(truth[1])
    rows, right = found[1][:n], truth[1]
    recall = np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(rows, right, strict=True)])
    a, b = (voted(distances[:n], near[:n], codes) for distances, near in (found, truth))
    other, most = np.mean(a[0] != b[0]), np.abs(a[1] - b[1]).max()
    print(
        f"  {who:12}{seconds[0]:8.2f} s {seconds[1]:8.2f} CPU-s  recall {recall:.4f}  other labels {other:.2%}  uncertainty {most:.1e}{note}",
        flush=True,
    )


def voted(
    distances: NDArray[np.float64], rows: NDArray[np.int64], codes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    share = np.zeros((len(rows), codes.max() + 1))
    np.add.at(share, (np.arange(len(rows))[:, None], codes[rows]), kernel(distances))
    return share.argmax(1), 1 - share.max(1)


def by_force(reference: NDArray[np.float32], query: NDArray[np.float32], k: int) -> Found:
    found = []
    for part in np.array_split(query, max(1, len(query) // 50)):
        distances = cdist(part, reference)
        rows = np.argpartition(distances, k, axis=1)[:, :k]
        near = np.take_along_axis(distances, rows, 1)
        order = near.argsort(1)
        found.append((np.take_along_axis(near, order, 1), np.take_along_axis(rows, order, 1)))
    return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])


def ours(options: argparse.Namespace, probes: list[Probe] | None = None) -> Search:
    def search(reference: NDArray[np.float32], query: NDArray[np.float32]) -> Found:
        index = CellIndex(reference, np.arange(len(reference)), exact=options.exact)
        probe = index.probe(query, options.neighbors, options.threads)
        if probes is not None:
            probes.append(probe)
        return index.search(query, options.neighbors, probe, options.threads)

    return search


def sklearn(options: argparse.Namespace) -> Search:
    def search(reference: NDArray[np.float32], query: NDArray[np.float32]) -> Found:
        index = NearestNeighbors(n_neighbors=options.neighbors, algorithm="brute", n_jobs=-1).fit(reference)
        distances, rows = index.kneighbors(query)
        return distances.astype(np.float64), rows

    return search


def flat(options: argparse.Namespace) -> Search:
    def search(reference: NDArray[np.float32], query: NDArray[np.float32]) -> Found:
        index = faiss.IndexFlatL2(reference.shape[1])
        index.add(reference)
        squares, rows = index.search(query, options.neighbors)
        return np.sqrt(np.maximum(squares, 0).astype(np.float64)), rows

    return search


def pynndescent(options: argparse.Namespace) -> Search:
    from pynndescent import NNDescent

    def search(reference: NDArray[np.float32], query: NDArray[np.float32]) -> Found:
        index = NNDescent(reference, n_neighbors=options.neighbors, random_state=0, n_jobs=options.threads)
        index.prepare()
        rows, distances = index.query(query, k=options.neighbors)
        return distances.astype(np.float64), rows.astype(np.int64)

    return search


PEERS: dict[str, Callable[[argparse.Namespace], Search]] = {
    "sklearn": sklearn,
    "flat": flat,
    "pynndescent": pynndescent,
}


def made(name: str, options: argparse.Namespace) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
    """Reference latents, their codes, query latents."""
    n, rng = options.references + options.queries, np.random.default_rng(0)
    if name == "real":
        labels = np.load(options.labels) if options.labels else None
        cells, codes = between(np.load(options.latent), labels, n, rng)
    elif name.startswith("noise"):
        cells, codes = rng.normal(size=(n, int(name[5:]))).astype(np.float32), rng.integers(0, 40, n)
    else:
        cells, codes = mixture(n, int(name[7:]), rng)
    return cells[: options.references], codes[: options.references], cells[options.references :]


def mixture(n: int, d: int, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    kinds = 60
    kind = rng.choice(kinds, n, p=rng.dirichlet(np.full(kinds, 0.5)))
    axes = rng.normal(size=(kinds, 5, d)) * 0.5
    cells = (1.5 * rng.normal(size=(kinds, d))).astype(np.float32)[kind]
    for start in range(0, n, 100_000):
        part = slice(start, start + 100_000)
        here = kind[part]
        cloud = np.einsum("nk,nkd->nd", rng.normal(size=(len(here), 5)), axes[here])
        cells[part] += (cloud + 0.4 * rng.normal(size=cloud.shape)).astype(np.float32)
    return cells, kind


def between(
    latent: NDArray[np.float32], labels: NDArray[np.int64] | None, n: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    labels = np.zeros(len(latent), np.int64) if labels is None else labels.astype(np.int64)
    near = NearestNeighbors(n_neighbors=16).fit(latent).kneighbors(latent, return_distance=False)[:, 1:]
    one = rng.integers(0, len(latent), n)
    other = near[one, rng.integers(0, 15, n)]
    gaps = latent[other] - latent[one]
    noise = rng.normal(size=gaps.shape) * np.linalg.norm(gaps, axis=1, keepdims=True) / gaps.shape[1] ** 0.5 / 10
    return (latent[one] + rng.random((n, 1)) * gaps + noise).astype(np.float32), labels[one]


if __name__ == "__main__":
    main()
