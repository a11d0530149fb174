"""Attention of one new token: q and k norm, rotary embedding, append to the cache, split attention, and the combine."""

import triton
import triton.language as tl

NOTHING = tl.constexpr(-1.0e30)
"""A score below all others, finite so that the difference of two is."""
ROWS = tl.constexpr(16)
"""Rows of a tensor-core product; the query heads of a group fill up to that many."""


@triton.jit
def _dot(a, b, ASM: tl.constexpr):
    # The interpreter multiplies the bits of bfloat16. Products of two halves are exact in float32.
    return tl.dot(a, b) if ASM else tl.dot(a.to(tl.float32), b.to(tl.float32))


@triton.jit
def _attend(q, k, v, is_row, peak, total, weighted, ASM: tl.constexpr):
    """Take a block of cached rows into the running softmax, whose scores are in units of ln 2."""
    scores = tl.where(is_row[None, :], _dot(q, tl.trans(k), ASM), NOTHING)
    higher = tl.maximum(peak, tl.max(scores, axis=1))
    shrink = tl.exp2(peak - higher)
    chances = tl.where(is_row[None, :], tl.exp2(scores - higher[:, None]), 0.0)
    total = total * shrink + tl.sum(chances, axis=1)
    weighted = weighted * shrink[:, None] + _dot(chances.to(v.dtype), v, ASM)
    return higher, total, weighted


@triton.jit
def _combine(
    out,
    partial,
    peaks,
    totals,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Join what the splits of one group of heads found, always in the order of the splits."""
    head = tl.arange(0, PADDED)
    is_head = head < GROUP
    column = tl.arange(0, D)
    highest = tl.full([PADDED], NOTHING, tl.float32)
    for split in tl.static_range(SPLITS):
        peak = tl.load(peaks + split * GROUP + head, mask=is_head, other=NOTHING, cache_modifier=".cg")
        highest = tl.maximum(highest, peak)
    total = tl.zeros([PADDED], tl.float32)
    weighted = tl.zeros([PADDED, D], tl.float32)
    for split in tl.static_range(SPLITS):
        row = split * GROUP + head
        peak = tl.load(peaks + row, mask=is_head, other=NOTHING, cache_modifier=".cg")
        share = tl.exp2(peak - highest)
        total += share * tl.load(totals + row, mask=is_head, other=1.0, cache_modifier=".cg")
        part = partial + row[:, None] * D + column[None, :]
        weighted += share[:, None] * tl.load(part, mask=is_head[:, None], other=0.0, cache_modifier=".cg")
    where = out + head[:, None] * D + column[None, :]
    tl.store(where, (weighted / total[:, None]).to(out.dtype.element_ty), mask=is_head[:, None])


@triton.jit
def attention(
    qkv,
    q_norm,
    k_norm,
    cos,
    sin,
    lengths,
    slots,
    keys,
    values,
    out,
    partial,
    peaks,
    totals,
    counters,
    capacity,
    eps,
    scale,
    H: tl.constexpr,
    KVH: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attend with the H // KVH query heads of one key/value head of one row, over one split of its cache.

    Programs: splits, key/value heads, rows. `qkv` [B, (H + 2 KVH) D], `cos` and `sin` [B, D] with the halves repeated,
    caches [slots, KVH, capacity, D], `out` [B, H D]; `scale` holds 1 / ln 2. PADDED is a power of two >= H // KVH.
    The new key and value are split 0's own: they are stored, and never read from the cache.
    """
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.program_id(2)
    GROUP: tl.constexpr = H // KVH
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # Lengths, slots and the cache below them are older than the step: they are read before the wait, the first two past
    # L1, where those of the step before may be. No row is appended outside of the slot, whatever the length.
    past = tl.load(lengths + row, cache_modifier=".cg").to(tl.int32)
    past = tl.minimum(tl.maximum(past, 0), capacity - 1)
    slot = tl.load(slots + row, cache_modifier=".cg").to(tl.int64)
    # The bounds of a split depend on the row's own length alone.
    chunk = ((past + SPLITS - 1) // SPLITS + 15) // 16 * 16
    begin = split * chunk
    end = tl.minimum(begin + chunk, past)
    cache = (slot * KVH + kv_head) * capacity.to(tl.int64) * D
    column = tl.arange(0, D)
    place = tl.arange(0, BLOCK)
    block = place[:, None] * D + column[None, :]
    k_block = keys + cache + block
    v_block = values + cache + block
    is_first_row = begin + place < end
    first_k = tl.load(k_block + begin * D, mask=is_first_row[:, None], other=0.0)
    first_v = tl.load(v_block + begin * D, mask=is_first_row[:, None], other=0.0)
    partner = column ^ (D // 2)
    q_gain = tl.load(q_norm + column).to(tl.float32)
    q_gain_partner = tl.load(q_norm + partner).to(tl.float32)
    k_gain = tl.load(k_norm + column).to(tl.float32)
    k_gain_partner = tl.load(k_norm + partner).to(tl.float32)
    head = tl.arange(0, ROWS)
    is_head = head < GROUP
    if PDL:
        tl.extra.cuda.gdc_wait()

    base = qkv + row * ((H + 2 * KVH) * D)
    q_rows = base + (kv_head * GROUP + head)[:, None] * D
    q = tl.load(q_rows + column[None, :], mask=is_head[:, None], other=0.0).to(tl.float32)
    q_partner = tl.load(q_rows + partner[None, :], mask=is_head[:, None], other=0.0).to(tl.float32)
    k = tl.load(base + (H + kv_head) * D + column).to(tl.float32)
    k_partner = tl.load(base + (H + kv_head) * D + partner).to(tl.float32)
    new_v = tl.load(base + (H + KVH + kv_head) * D + column)
    cosine = tl.load(cos + row * D + column)
    sine = tl.load(sin + row * D + column) * tl.where(column < D // 2, -1.0, 1.0)

    q_rms = tl.rsqrt(tl.sum(q * q, axis=1) / D + eps) * scale
    rotated = q * (q_gain * cosine)[None, :] + q_partner * (q_gain_partner * sine)[None, :]
    q = (rotated * q_rms[:, None]).to(keys.dtype.element_ty)
    k_rms = tl.rsqrt(tl.sum(k * k, axis=0) / D + eps)
    new_k = ((k * (k_gain * cosine) + k_partner * (k_gain_partner * sine)) * k_rms).to(keys.dtype.element_ty)
    is_owner = split == 0
    appended = cache + past * D + column
    tl.store(keys + appended, new_k, mask=(column >= 0) & is_owner)
    tl.store(values + appended, new_v, mask=(column >= 0) & is_owner)

    score = tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], axis=1)
    peak = tl.where(is_owner, score, NOTHING)
    total = tl.where(is_owner, 1.0, 0.0) + tl.zeros([ROWS], tl.float32)
    weighted = tl.where(is_owner, new_v.to(tl.float32), 0.0)[None, :] + tl.zeros([ROWS, D], tl.float32)
    peak, total, weighted = _attend(q, first_k, first_v, is_first_row, peak, total, weighted, ASM)
    for position in tl.range(begin + BLOCK, end, BLOCK, num_stages=STAGES):
        is_row = position + place < end
        block_k = tl.load(k_block + position * D, mask=is_row[:, None], other=0.0)
        block_v = tl.load(v_block + position * D, mask=is_row[:, None], other=0.0)
        peak, total, weighted = _attend(q, block_k, block_v, is_row, peak, total, weighted, ASM)

    group = row * KVH + kv_head
    group_out = out + group * (GROUP * D)
    if SPLITS == 1:
        where = group_out + head[:, None] * D + column[None, :]
        tl.store(where, (weighted / total[:, None]).to(out.dtype.element_ty), mask=is_head[:, None])
    else:
        first_row = group * (SPLITS * GROUP)
        mine = first_row + split * GROUP + head
        tl.store(partial + mine[:, None] * D + column[None, :], weighted, mask=is_head[:, None])
        tl.store(peaks + mine, peak, mask=is_head)
        tl.store(totals + mine, total, mask=is_head)
        # All threads' stores come before the one that counts, whose release covers them.
        tl.debug_barrier()
        num_before = tl.atomic_add(counters + group, 1, sem="acq_rel")
        if num_before == SPLITS - 1:
            tl.store(counters + group, 0)
            _combine(
                group_out,
                partial + first_row * D,
                peaks + first_row,
                totals + first_row,
                GROUP,
                PADDED,
                D,
                SPLITS,
            )
