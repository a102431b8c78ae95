"""numba core of best_first"""
from __future__ import annotations
from typing import NamedTuple
import numpy as np
from specdec._jit import njit
from specdec.sources.ngram import IndexArrays, find, match_length
from specdec.sources.context_table import TableArrays, lookup, MAX_ORDER

TAIL = 32
SOURCES = 5
OWN, SHARED = 0, 1
BUCKETS = 192
CANDIDATES = 40
OCC = 16

class Growth(NamedTuple):
    tokens: np.ndarray   # [N, C] int32
    buckets: np.ndarray  # [N, C, S] int16
    probs: np.ndarray    # [N, C] float32
    counts: np.ndarray   # [N] int32 (-1 not expanded)
    tails: np.ndarray    # [N, TAIL] int32

class Learned(NamedTuple):
    success: np.ndarray  # [S, B]
    trials: np.ndarray   # [S, B]
    weights: np.ndarray  # [M, S + 1]

@njit
def _length_class(n):
    if n <= 4:
        return n - 1
    if n <= 6:
        return 4
    if n <= 9:
        return 5
    if n <= 15:
        return 6
    return 7

@njit
def _candidate(growth, node, token):
    count = growth.counts[node]
    for c in range(count):
        if growth.tokens[node, c] == token:
            return c
    if count == growth.tokens.shape[1]:
        return -1
    growth.tokens[node, count] = token
    for s in range(SOURCES):
        growth.buckets[node, count, s] = -1
    growth.counts[node] = count + 1
    return count

@njit
def _context(index, growth, node, source, params, scratch):
    """occurrences of the node's suffix"""
    tail = growth.tails[node]
    end = TAIL - 1
    seen = 0
    best = 0
    total = 0.0
    weight = scratch[0]
    number = scratch[1]
    longest = scratch[2]
    for c in range(CANDIDATES):
        weight[c] = 0.0
        number[c] = 0.0
        longest[c] = 0.0
    upper = TAIL + 1
    maxocc = int(params[0])
    for row in range(len(index.lengths) - 1, -1, -1):
        n = index.lengths[row]
        pos = find(index, row, tail, end)
        visited = 0
        while pos >= 0 and seen < maxocc and visited < 2 * maxocc:
            visited += 1
            token = index.tokens[pos + 1]
            length = match_length(index, pos, tail, end, TAIL)
            if length < upper and token >= 0:
                if best == 0:
                    best = length
                c = _candidate(growth, node, token)
                if c >= 0:
                    if length > best:
                        best = length
                    w = params[1] ** (-float(min(length, 12))) * params[2] ** seen
                    weight[c] += w
                    number[c] += 1
                    if length > longest[c]:
                        longest[c] = length
                    total += w
                seen += 1
            pos = index.previous[row, pos]
        upper = n
        if seen >= maxocc:
            break
    return best, total

@njit
def _expand(own, shared, table, growth, node, params, scratch):
    growth.counts[node] = 0
    count0 = 0
    for source in range(2):
        index = own if source == 0 else shared
        best, total = _context(index, growth, node, source, params, scratch)
        base = 0 if best == 0 else 1 + 15 * _length_class(best)
        for c in range(growth.counts[node]):
            share = scratch[0, c] / total if total > 0 else 0.0
            b = base
            if scratch[1, c] > 0:
                sb = 0 if share < 0.34 else 1 if share < 0.67 else 2 if share < 0.95 else 3
                if scratch[2, c] == best:
                    nb = 0 if scratch[1, c] < 2 else 1 if scratch[1, c] < 4 else 2
                    b = base + 1 + sb * 3 + nb
                else:
                    b = base + 13 + (1 if share > 0.2 else 0)
            growth.buckets[node, c, source] = b
        # base for late candidates
        if source == 0:
            base_own = base
        else:
            base_shared = base
    bases = scratch[3]
    for order in range(MAX_ORDER, 0, -1):
        s = 2 + MAX_ORDER - order
        row = lookup(table, growth.tails[node], TAIL - 1, order) if order <= params[3] else -1
        bases[s] = 0 if row < 0 else 1
        if row >= 0:
            for rank in range(table.tokens.shape[1]):
                token = table.tokens[row, rank]
                if token < 0:
                    break
                c = _candidate(growth, node, token)
                if c >= 0:
                    p = table.probs[row, rank]
                    pb = int(min(9.0, max(0.0, 9.99 + 1.5 * np.log2(max(p, 1e-6)))))
                    if rank == 0:
                        pb = int(p * 9.99)
                    growth.buckets[node, c, s] = 2 + rank * 10 + pb
    for c in range(growth.counts[node]):
        if growth.buckets[node, c, 0] < 0:
            growth.buckets[node, c, 0] = base_own
        if growth.buckets[node, c, 1] < 0:
            growth.buckets[node, c, 1] = base_shared
        for s in range(2, SOURCES):
            if growth.buckets[node, c, s] < 0:
                growth.buckets[node, c, s] = int(bases[s])

@njit
def _stretch(p):
    p = min(max(p, 0.0005), 0.9995)
    return np.log(p / (1.0 - p))

@njit
def _mixset(growth, node):
    return 0

@njit
def _score(growth, node, learned, params):
    """softmax over candidates and none"""
    w = learned.weights[_mixset(growth, node)]
    count = growth.counts[node]
    total = 1.0
    for c in range(count):
        z = w[SOURCES]
        for s in range(SOURCES):
            b = growth.buckets[node, c, s]
            z += w[s] * _stretch(learned.success[s, b] / learned.trials[s, b])
        e = np.exp(min(z, 20.0))
        growth.probs[node, c] = e
        total += e
    for c in range(count):
        growth.probs[node, c] /= total

@njit
def _learn(growth, node, token, learned, rate, decay):
    """one visited node: token is what followed"""
    k = _mixset(growth, node)
    w = learned.weights[k]
    count = growth.counts[node]
    for c in range(count):
        err = (1.0 if growth.tokens[node, c] == token else 0.0) - growth.probs[node, c]
        if rate > 0:
            for s in range(SOURCES):
                b = growth.buckets[node, c, s]
                w[s] += rate * err * _stretch(learned.success[s, b] / learned.trials[s, b])
            w[SOURCES] += rate * err
    for c in range(count):
        y = 1.0 if growth.tokens[node, c] == token else 0.0
        for s in range(SOURCES):
            b = growth.buckets[node, c, s]
            learned.success[s, b] = learned.success[s, b] * decay + y
            learned.trials[s, b] = learned.trials[s, b] * decay + 1.0

@njit
def _sort(growth, node):
    count = growth.counts[node]
    for i in range(1, count):
        t = growth.tokens[node, i]
        p = growth.probs[node, i]
        b = growth.buckets[node, i].copy()
        j = i - 1
        while j >= 0 and growth.probs[node, j] < p:
            growth.tokens[node, j + 1] = growth.tokens[node, j]
            growth.probs[node, j + 1] = growth.probs[node, j]
            growth.buckets[node, j + 1] = growth.buckets[node, j]
            j -= 1
        growth.tokens[node, j + 1] = t
        growth.probs[node, j + 1] = p
        growth.buckets[node, j + 1] = b

@njit
def expand(own, shared, table, growth, node, learned, params, scratch):
    _expand(own, shared, table, growth, node, params, scratch)
    _score(growth, node, learned, params)
    _sort(growth, node)

@njit
def grow(own, shared, table, growth, learned, params, budget, depth_limit, eps, tokens, parents, path_probs, depths):
    """returns N"""
    scratch = np.zeros((4, max(CANDIDATES, 8)))
    n = 1
    path_probs[0] = 1.0
    depths[0] = 0
    nxt = np.zeros(budget, np.int32)
    expand(own, shared, table, growth, 0, learned, params, scratch)
    while n < budget:
        best = -1
        bp = eps
        for v in range(n):
            i = nxt[v]
            if i < growth.counts[v] and depths[v] < depth_limit:
                p = path_probs[v] * growth.probs[v, i]
                if p > bp:
                    bp = p
                    best = v
        if best < 0:
            break
        tok = growth.tokens[best, nxt[best]]
        nxt[best] += 1
        tokens[n] = tok
        parents[n] = best
        path_probs[n] = bp
        depths[n] = depths[best] + 1
        growth.tails[n, : TAIL - 1] = growth.tails[best, 1:]
        growth.tails[n, TAIL - 1] = tok
        expand(own, shared, table, growth, n, learned, params, scratch)
        n += 1
    return n
