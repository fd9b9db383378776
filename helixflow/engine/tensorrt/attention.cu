// Attention over the key/value caches, for engines that are split at it.
//
// Three kernels, compiled for one model and one device: `append` writes the keys and values of a launch into the caches,
// `attend` reads what each token sees of them, `combine` joins the results of tokens that see so much that several
// blocks share the work. All arithmetic is fp32; elements are fp32, fp16 or bf16.
//
// Layouts, T tokens in the order of the rows of the cache, B rows of S positions:
//   q, out            [T, HEADS, HEAD_DIM]          HEADS = KV_HEADS * GROUP
//   k, v              [T, KV_HEADS, HEAD_DIM]
//   k_cache, v_cache  [B, KV_HEADS, S, HEAD_DIM]
//   cu_q              [B + 1]                       tokens before each row
//   position_ids      [T]
//   partial           [T, HEADS, splits, HEAD_DIM + 2] fp32: weighted sum of values, largest score, sum of weights
//
// A token at position p sees the positions p - window + 1 .. p of its row (window 0: all up to p). They are cut into at
// most `splits` spans of at least `least` positions; block (token, heads of a group, span) reads one, so that a lone long
// sequence still fills the device, and every sequence costs what it holds. What a token gets does not depend on which
// others are in the launch.
//
// The text stays within what C and CUDA C++ have in common, and includes nothing: NVRTC comes without headers, and the
// tests compile this very file for the CPU. Sizes come from the compiler's command line (see kernels.py):
//   ELEMENT_BYTES, ELEMENT_BF16  type of an element: 4 is fp32; 2 is fp16, or bf16 where the second is 1
//   HEAD_DIM, KV_HEADS, GROUP    sizes of the model; GROUP query heads share a key/value head
//   SCALE                        factor of the scores, times log2(e): weights are powers of two
//   VECTOR_BYTES                 what a thread loads at once
//   LANES                        threads of a warp that share a position, a power of two
//   SWEEPS                       vectors of a head per lane
//   BLOCK_HEADS, PARTS           query heads of a group that a block serves, and blocks that a group takes
//   DEPTH                        positions whose loads a thread has under way at once
//   WARPS                        warps of a block

#define WARP 32
#define THREADS (WARPS * WARP)
#define HEADS (KV_HEADS * GROUP)
// Each team reads every TEAMS-th position of a span.
#define TEAMS (THREADS / LANES)
#define WORD_ELEMENTS (4 / ELEMENT_BYTES)
#define VECTOR_WORDS (VECTOR_BYTES / 4)
#define VECTOR_ELEMENTS (VECTOR_BYTES / ELEMENT_BYTES)
#define HEAD_WORDS (HEAD_DIM / WORD_ELEMENTS)
#define HEAD_VECTORS (HEAD_WORDS / VECTOR_WORDS)
// Elements of a head that a lane holds.
#define SHARE (SWEEPS * VECTOR_ELEMENTS)
#define PARTIAL (HEAD_DIM + 2)
// Below every score, and finite: a difference of two of them is 0, not NaN.
#define LOWEST -3.0e38f
#define EVERY_LANE 0xffffffffu

#ifdef __cplusplus
#define KERNEL extern "C" __global__
#else
#define KERNEL __global__
#endif
#define DEVICE static __device__ __forceinline__

typedef unsigned int word;
typedef struct __align__(VECTOR_BYTES) {
    word words[VECTOR_WORDS];
} vector;

#ifdef __CUDACC__
// Two fp16 numbers in a word, the first in its low half. The types of cuda_fp16.h would need the header.
DEVICE void widen_half(word pair, float *low, float *high) {
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
        : "=f"(*low), "=f"(*high)
        : "r"(pair));
}

DEVICE word narrow_half(float low, float high) {
    word pair;
    asm("{ .reg .b16 a, b; cvt.rn.f16.f32 a, %1; cvt.rn.f16.f32 b, %2; mov.b32 %0, {a, b}; }"
        : "=r"(pair)
        : "f"(low), "f"(high));
    return pair;
}
#endif

// To nearest, ties to even, as the hardware rounds; the carry of a NaN's bits must not make a number of it.
DEVICE word narrow_bf16(float value) {
    word bits = __float_as_uint(value);
    if (value != value)
        return 0x7fff;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// The WORD_ELEMENTS numbers of a word.
DEVICE void widen(word packed, float *values) {
#if ELEMENT_BYTES == 4
    values[0] = __uint_as_float(packed);
#elif ELEMENT_BF16
    values[0] = __uint_as_float(packed << 16);
    values[1] = __uint_as_float(packed & 0xffff0000u);
#else
    widen_half(packed, &values[0], &values[1]);
#endif
}

DEVICE word narrow(const float *values) {
#if ELEMENT_BYTES == 4
    return __float_as_uint(values[0]);
#elif ELEMENT_BF16
    return narrow_bf16(values[0]) | narrow_bf16(values[1]) << 16;
#else
    return narrow_half(values[0], values[1]);
#endif
}

// A lane's share of a head; lanes behind the last vector hold zeros, which add nothing.
DEVICE void load(const vector *head, int lane, vector *share) {
#pragma unroll
    for (int sweep = 0; sweep < SWEEPS; sweep++) {
        int at = sweep * LANES + lane;
        if (at < HEAD_VECTORS)
            share[sweep] = head[at];
        else
            for (int i = 0; i < VECTOR_WORDS; i++)
                share[sweep].words[i] = 0;
    }
}

DEVICE void widen_share(const vector *share, float *values) {
#pragma unroll
    for (int sweep = 0; sweep < SWEEPS; sweep++)
#pragma unroll
        for (int i = 0; i < VECTOR_WORDS; i++)
            widen(share[sweep].words[i], &values[sweep * VECTOR_ELEMENTS + i * WORD_ELEMENTS]);
}

// Sum over lanes whose numbers differ only in the bits from `first` on, below `end`; each of them gets it.
DEVICE float sum_lanes(float value, int first, int end) {
#pragma unroll
    for (int bit = first; bit < end; bit *= 2)
        value += __shfl_xor_sync(EVERY_LANE, value, bit);
    return value;
}

// The row of the cache that a token belongs to, -1: none. Rows without tokens begin where the next one does.
DEVICE int row_of(int token, const int *cu_q, int rows) {
    int low = 0, high = rows;
    if (token < cu_q[0] || token >= cu_q[rows])
        return -1;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (cu_q[middle] <= token)
            low = middle;
        else
            high = middle;
    }
    return low;
}

// First position that a token sees.
DEVICE int first_seen(int position, int window) {
    return window > 0 && position >= window ? position - window + 1 : 0;
}

// Positions of a span of `seen` ones.
DEVICE int span_of(int seen, int least, int splits) {
    int even = (seen + splits - 1) / splits;
    return even > least ? even : least;
}

// A vector of a cache, the first of the head at one position.
DEVICE long long place(int row, int kv_head, int position, int positions) {
    return (((long long)row * KV_HEADS + kv_head) * positions + position) * HEAD_VECTORS;
}

// Grid (T), THREADS threads. Tokens outside the caches are left out.
KERNEL void __launch_bounds__(THREADS) append(
    const vector *__restrict__ k, const vector *__restrict__ v, const int *__restrict__ cu_q,
    const int *__restrict__ position_ids, int rows, int positions, vector *__restrict__ k_cache,
    vector *__restrict__ v_cache) {
    int token = blockIdx.x;
    int row = row_of(token, cu_q, rows), position = position_ids[token];
    if (row < 0 || position < 0 || position >= positions)
        return;
    for (int i = threadIdx.x; i < KV_HEADS * HEAD_VECTORS; i += THREADS) {
        long long from = (long long)token * (KV_HEADS * HEAD_VECTORS) + i;
        long long to = place(row, i / HEAD_VECTORS, position, positions) + i % HEAD_VECTORS;
        k_cache[to] = k[from];
        v_cache[to] = v[from];
    }
}

// Grid (T, KV_HEADS * PARTS, splits), THREADS threads. Tokens that one span covers are finished here, the others by
// `combine`.
KERNEL void __launch_bounds__(THREADS) attend(
    const vector *__restrict__ q, const vector *__restrict__ k_cache, const vector *__restrict__ v_cache,
    const int *__restrict__ cu_q, const int *__restrict__ position_ids, int rows, int positions, int window, int least,
    word *__restrict__ out, float *__restrict__ partial) {
    __shared__ float team_tops[TEAMS][BLOCK_HEADS];
    __shared__ float block_tops[BLOCK_HEADS];
    __shared__ float warp_totals[WARPS][BLOCK_HEADS];
    __shared__ float warp_sums[WARPS][BLOCK_HEADS][HEAD_DIM];

    int token = blockIdx.x, kv_head = blockIdx.y / PARTS, first_head = blockIdx.y % PARTS * BLOCK_HEADS;
    int position = position_ids[token];
    if (position < 0 || position >= positions)
        return;
    int first = first_seen(position, window);
    int span = span_of(position + 1 - first, least, gridDim.z);
    int begin = first + (int)blockIdx.z * span;
    if (begin > position)
        return;
    int row = row_of(token, cu_q, rows);
    if (row < 0)
        return;
    int end = begin + span <= position ? begin + span : position + 1;
    int lane = threadIdx.x % LANES, team = threadIdx.x / LANES, warp = threadIdx.x / WARP;
    const vector *keys = k_cache + place(row, kv_head, 0, positions);
    const vector *values = v_cache + place(row, kv_head, 0, positions);
    long long head_0 = (long long)token * HEADS + kv_head * GROUP + first_head;

    float query[BLOCK_HEADS][SHARE], sum[BLOCK_HEADS][SHARE], top[BLOCK_HEADS], total[BLOCK_HEADS];
#pragma unroll
    for (int h = 0; h < BLOCK_HEADS; h++) {
        // The last block of a group may have fewer heads; it computes one of them again.
        int head = first_head + h < GROUP ? h : 0;
        vector share[SWEEPS];
        load(q + (head_0 + head) * HEAD_VECTORS, lane, share);
        widen_share(share, query[h]);
        top[h] = LOWEST;
        total[h] = 0;
#pragma unroll
        for (int i = 0; i < SHARE; i++)
            sum[h][i] = 0;
    }

    // Every thread goes through every round, because lanes exchange numbers. Behind the end a team reads the last position
    // again, and gives it no weight: what lies there may be NaN, and loads under conditions wait for each other.
    for (int round = begin; round < end; round += DEPTH * TEAMS) {
        vector key_share[DEPTH][SWEEPS], value_share[DEPTH][SWEEPS];
        float weight[DEPTH][BLOCK_HEADS];
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            int at = round + d * TEAMS + team;
            long long from = (long long)(at < end ? at : end - 1) * HEAD_VECTORS;
            load(keys + from, lane, key_share[d]);
            load(values + from, lane, value_share[d]);
        }
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            float key[SHARE];
            widen_share(key_share[d], key);
#pragma unroll
            for (int h = 0; h < BLOCK_HEADS; h++) {
                float score = 0;
#pragma unroll
                for (int i = 0; i < SHARE; i++)
                    score += query[h][i] * key[i];
                weight[d][h] = sum_lanes(score, 1, LANES) * SCALE;
            }
        }
#pragma unroll
        for (int h = 0; h < BLOCK_HEADS; h++) {
            float best = top[h];
#pragma unroll
            for (int d = 0; d < DEPTH; d++)
                best = fmaxf(best, weight[d][h]);
            float shrink = exp2f(top[h] - best);
            top[h] = best;
            total[h] *= shrink;
#pragma unroll
            for (int i = 0; i < SHARE; i++)
                sum[h][i] *= shrink;
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                int seen = round + d * TEAMS + team < end;
                weight[d][h] = seen ? exp2f(weight[d][h] - best) : 0;
                total[h] += weight[d][h];
            }
        }
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            float value[SHARE];
            widen_share(value_share[d], value);
#pragma unroll
            for (int h = 0; h < BLOCK_HEADS; h++)
#pragma unroll
                for (int i = 0; i < SHARE; i++)
                    sum[h][i] += weight[d][h] * value[i];
        }
    }

    // The teams bring their sums to the largest score of the block; then they only have to be added.
    if (lane == 0)
#pragma unroll
        for (int h = 0; h < BLOCK_HEADS; h++)
            team_tops[team][h] = top[h];
    __syncthreads();
#pragma unroll
    for (int h = 0; h < BLOCK_HEADS; h++) {
        float best = LOWEST;
        for (int t = 0; t < TEAMS; t++)
            best = fmaxf(best, team_tops[t][h]);
        float shrink = exp2f(top[h] - best);
        float warp_total = sum_lanes(total[h] * shrink, LANES, WARP);
        if (threadIdx.x == 0)
            block_tops[h] = best;
        if (threadIdx.x % WARP == 0)
            warp_totals[warp][h] = warp_total;
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            float warp_sum = sum_lanes(sum[h][i] * shrink, LANES, WARP);
            int at = (i / VECTOR_ELEMENTS * LANES + lane) * VECTOR_ELEMENTS + i % VECTOR_ELEMENTS;
            if (threadIdx.x % WARP < LANES && at < HEAD_DIM)
                warp_sums[warp][h][at] = warp_sum;
        }
    }
    __syncthreads();

    int split = first + span <= position;
    for (int i = threadIdx.x; i < BLOCK_HEADS * HEAD_WORDS; i += THREADS) {
        int h = i / HEAD_WORDS, at = i % HEAD_WORDS;
        if (first_head + h >= GROUP)
            break;
        float total_h = 0, numbers[WORD_ELEMENTS];
        for (int w = 0; w < WARPS; w++)
            total_h += warp_totals[w][h];
        for (int e = 0; e < WORD_ELEMENTS; e++) {
            numbers[e] = 0;
            for (int w = 0; w < WARPS; w++)
                numbers[e] += warp_sums[w][h][at * WORD_ELEMENTS + e];
        }
        if (split) {
            float *mine = partial + ((head_0 + h) * gridDim.z + blockIdx.z) * PARTIAL;
            for (int e = 0; e < WORD_ELEMENTS; e++)
                mine[at * WORD_ELEMENTS + e] = numbers[e];
            if (at == 0) {
                mine[HEAD_DIM] = block_tops[h];
                mine[HEAD_DIM + 1] = total_h;
            }
        } else {
            for (int e = 0; e < WORD_ELEMENTS; e++)
                numbers[e] /= total_h;
            out[(head_0 + h) * HEAD_WORDS + at] = narrow(numbers);
        }
    }
}

// Grid (T, HEADS), THREADS threads; `splits`: depth of the grid of `attend`.
KERNEL void __launch_bounds__(THREADS) combine(
    const float *__restrict__ partial, const int *__restrict__ position_ids, int positions, int window, int least,
    int splits, word *__restrict__ out) {
    int token = blockIdx.x, position = position_ids[token];
    if (position < 0 || position >= positions)
        return;
    int seen = position + 1 - first_seen(position, window), span = span_of(seen, least, splits);
    int count = (seen + span - 1) / span;
    if (count == 1)
        return;
    long long head = (long long)token * HEADS + blockIdx.y;
    const float *mine = partial + head * splits * PARTIAL;
    float best = LOWEST, total = 0;
    for (int s = 0; s < count; s++)
        best = fmaxf(best, mine[s * PARTIAL + HEAD_DIM]);
    for (int s = 0; s < count; s++)
        total += mine[s * PARTIAL + HEAD_DIM + 1] * exp2f(mine[s * PARTIAL + HEAD_DIM] - best);
    for (int at = threadIdx.x; at < HEAD_WORDS; at += THREADS) {
        float numbers[WORD_ELEMENTS];
        for (int e = 0; e < WORD_ELEMENTS; e++) {
            numbers[e] = 0;
            for (int s = 0; s < count; s++)
                numbers[e] += mine[s * PARTIAL + at * WORD_ELEMENTS + e] * exp2f(mine[s * PARTIAL + HEAD_DIM] - best);
            numbers[e] /= total;
        }
        out[head * HEAD_WORDS + at] = narrow(numbers);
    }
}
