"""Near-duplicates within a set: against brute force, in the order of the selection."""

import numpy as np

from ktray.data.fingerprints import Fingerprints
from ktray.retrieval import set_duplicates as module
from ktray.retrieval.set_duplicates import SetDuplicates


def world(n=40, d=8, seed=0):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, d))
    hashes = rng.integers(0, 2**63, n, dtype=np.int64).astype(np.uint64)
    digests = np.arange(n, dtype=np.uint64)
    for copy, of, bits in ((7, 3, 2), (20, 3, 6), (21, 5, 7), (30, 7, 0)):
        vectors[copy] = vectors[of] + 0.01
        hashes[copy] = hashes[of] ^ np.uint64((1 << bits) - 1)
    digests[35] = digests[11]  # the same pixels, whatever the embedding says
    hashes[35] = hashes[11]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), Fingerprints(hashes, digests)


def look(vectors, prints):
    return lambda rows: (
        vectors[rows] if vectors is not None else None,
        Fingerprints(prints.hash[rows], prints.digest[rows]),
    )


def brute(order, vectors, prints, similarity):
    kept, of = [], {}
    for a in order:
        for b in kept:
            bits = bin(int(prints.hash[a]) ^ int(prints.hash[b])).count("1")
            if prints.digest[a] == prints.digest[b] or (vectors[a] @ vectors[b] >= similarity and bits <= 6):
                of[a] = b
                break
        else:
            kept.append(a)
    return of


def test_equal_to_brute_force_whatever_the_order(monkeypatch):
    vectors, prints = world()
    for values, of_a_span in ((16_000_000, 1_000_000_000), (100, 1_000_000_000), (100, 150), (16_000_000, 1)):
        monkeypatch.setattr(module, "_VALUES_AT_ONCE", values)
        monkeypatch.setattr(module, "_VALUES_OF_A_SPAN", of_a_span)
        for seed in range(5):
            order = np.random.default_rng(seed).permutation(40)
            found = SetDuplicates(look(vectors, prints), 0.95)
            dropped = found(order)
            expected = brute(order.tolist(), vectors, prints, 0.95)
            assert set(dropped.tolist()) == set(expected)
            assert set(found.repeats) == set(expected)


def test_known_pairs():
    vectors, prints = world()
    found = SetDuplicates(look(vectors, prints), 0.95)
    assert found(np.arange(40)).tolist() == [7, 20, 30, 35]
    assert found.repeats[7] == 3
    assert found.repeats[35] == 11
    assert 21 not in found.repeats  # its hash is one bit too far


def test_a_selection_that_grows_is_compared_with_what_passed():
    vectors, prints = world()
    found = SetDuplicates(look(vectors, prints), 0.95)
    assert found(np.arange(0, 10)).tolist() == [7]
    assert found(np.arange(0, 25)[np.arange(0, 25) != 7]).tolist() == [20]
    assert found(np.array([3, 5, 12])).tolist() == []


def test_without_embeddings_only_equal_hashes_count():
    _, prints = world()
    assert SetDuplicates(look(None, prints), 0.95)(np.arange(40)).tolist() == [30, 35]


def test_a_chain_of_slight_changes_keeps_what_repeats_only_dropped_ones():
    # 0 is near 1, 1 is near 2, 0 is not near 2
    angles = np.array([0.0, 0.3, 0.6])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    prints = Fingerprints(np.zeros(3, np.uint64), np.arange(3, dtype=np.uint64))
    assert SetDuplicates(look(vectors, prints), 0.9)(np.arange(3)).tolist() == [1]
