// What the forward pass of a decoder does beside matrix products, on an NVIDIA GPU.
//
// Compiled at run time (NVRTC) with
//   BF16  1: numbers that are multiplied are bf16 (`T`), 0: f32
//   D     width of a head, a multiple of 16, at most 128
//   KEYS  prefix and chunk tokens at most, a multiple of 16
// No header is needed. Rows of all chunks stand one behind the other; chunk c has rows starts[c] .. starts[c + 1].
// Sums are taken in a fixed order that depends on the chunk alone.

#define HALF (D / 2)

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ float low(u32 both) { return __uint_as_float(both << 16); }
__device__ __forceinline__ float high(u32 both) { return __uint_as_float(both & 0xffff0000u); }
__device__ __forceinline__ bool finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// The sum over a block of at most 1 024 threads, the same in every thread.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float parts[32];
    for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(~0u, x, step);
    if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = x;
    __syncthreads();
    float total = 0;
    for (int i = 0; i < (blockDim.x + 31) >> 5; ++i) total += parts[i];
    __syncthreads();
    return total;
}

// x[row] = table[tokens[row]]; one block a row.
extern "C" __global__ void embed(float* x, const T* table, const u32* tokens, int width) {
    const T* from = table + (size_t)tokens[blockIdx.x] * width;
    float* to = x + (size_t)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = up(from[i]);
}

// normed[row] = x[row] / sqrt(mean(x^2) + eps) * gamma; one block a row.
extern "C" __global__ void rms_norm(T* normed, const float* x, const float* gamma, int width, float eps) {
    const float* from = x + (size_t)blockIdx.x * width;
    T* to = normed + (size_t)blockIdx.x * width;
    float squares = 0;
    for (int i = threadIdx.x * 2; i < width; i += blockDim.x * 2) {
        float2 v = *(const float2*)(from + i);
        squares += v.x * v.x + v.y * v.y;
    }
    float scale = rsqrtf(block_sum(squares) / width + eps);
    for (int i = threadIdx.x * 2; i < width; i += blockDim.x * 2) {
        float2 v = *(const float2*)(from + i), g = *(const float2*)(gamma + i);
#if BF16
        *(u32*)(to + i) = pack(v.x * scale * g.x, v.y * scale * g.y);
#else
        *(float2*)(to + i) = make_float2(v.x * scale * g.x, v.y * scale * g.y);
#endif
    }
}

// The norm of each head, in place (Qwen3). One warp a head; `first`: column of the first head, `heads` of them.
extern "C" __global__ void head_norm(T* rows, const float* gamma, int stride, int first, int heads, int count, float eps) {
    int head = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (head >= count) return;
    T* at = rows + (size_t)(head / heads) * stride + first + (head % heads) * D;
    float squares = 0;
    for (int i = lane; i < D; i += 32) squares += up(at[i]) * up(at[i]);
    for (int step = 16; step > 0; step >>= 1) squares += __shfl_xor_sync(~0u, squares, step);
    float scale = rsqrtf(squares / D + eps);
    for (int i = lane; i < D; i += 32) put(at + i, up(at[i]) * scale * gamma[i]);
}

// rows += bias; one block a row.
extern "C" __global__ void add_bias(T* rows, const float* bias, int width) {
    T* row = rows + (size_t)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) put(row + i, up(row[i]) + bias[i]);
}

// The same for f32 rows.
extern "C" __global__ void add_bias_f32(float* rows, const float* bias, int width) {
    float* row = rows + (size_t)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) row[i] += bias[i];
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// out[row] = silu(gate_up[row][..width]) * gate_up[row][width..]; `width` is even; one block a row.
extern "C" __global__ void silu_times(T* out, const T* gate_up, int width) {
    const T* gate = gate_up + (size_t)blockIdx.x * 2 * width;
    T* to = out + (size_t)blockIdx.x * width;
#if BF16
    if (width % 8 == 0) {
        for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
            uint4 g = *(const uint4*)(gate + i), u = *(const uint4*)(gate + width + i), made;
            made.x = pack(silu(low(g.x)) * low(u.x), silu(high(g.x)) * high(u.x));
            made.y = pack(silu(low(g.y)) * low(u.y), silu(high(g.y)) * high(u.y));
            made.z = pack(silu(low(g.z)) * low(u.z), silu(high(g.z)) * high(u.z));
            made.w = pack(silu(low(g.w)) * low(u.w), silu(high(g.w)) * high(u.w));
            *(uint4*)(to + i) = made;
        }
        return;
    }
#endif
    for (int i = threadIdx.x; i < width; i += blockDim.x) put(to + i, silu(up(gate[i])) * up(gate[width + i]));
}

#if BF16
// d += a b, 16 x 8 x 16. Thread 4 g + t holds of a the rows g and g + 8, of b and d the columns below.
__device__ __forceinline__ void multiply_add(float d[4], const u32 a[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 rows of queries, from row `row`, as the left operand of D / 16 products: group j holds columns 8 j + 2 t, + 1 of
// rows g and g + 8. Rows from `rows` on are zero.
__device__ __forceinline__ void load_queries(u32 a[D / 8][2], const u16* q, int stride, int row, int rows) {
    int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    for (int half = 0; half < 2; ++half) {
        int at = row + g + half * 8;
        const u16* from = q + (size_t)at * stride + 2 * t;
#pragma unroll
        for (int j = 0; j < D / 8; ++j) a[j][half] = at < rows ? *(const u32*)(from + j * 8) : 0;
    }
}

#define K_STRIDE (D + 8)
#define V_STRIDE (KEYS + 8)

// Causal attention of prefix and chunk. Grid: chunk, query head. 256 threads: a warp takes 16 queries.
// qkv: [row][(heads + 2 kv_heads) * D] before RoPE; cos, sin: [position][D / 2], position 0 is the chunk's first token;
// prefix_k (rotated), prefix_v: [kv_head][r][D]; out: [row][heads * D].
extern "C" __global__ void __launch_bounds__(256) attend(
    T* out, const T* qkv, const int* starts, const float* cos, const float* sin,
    const T* prefix_k, const T* prefix_v, int r, int heads, int kv_heads, float scale) {
    extern __shared__ __align__(16) u16 shared[];
    u16* keys = shared;                     // [key][K_STRIDE]
    u16* values = shared + KEYS * K_STRIDE; // [dim][V_STRIDE]
    int chunk = blockIdx.x, head = blockIdx.y, kv_head = head / (heads / kv_heads);
    int first = starts[chunk], rows = starts[chunk + 1] - first, stride = (heads + 2 * kv_heads) * D;
    const u16* chunk_qkv = qkv + (size_t)first * stride;
    int total = r + rows, padded = (total + 15) & ~15;

    // 1. keys, rotated, and values, turned, of the prefix and the chunk
    for (int i = threadIdx.x; i < padded * (HALF / 2); i += 256) {
        int key = i / (HALF / 2), pair = i % (HALF / 2) * 2;
        u32 a = 0, b = 0;
        if (key < r) {
            const u16* from = prefix_k + ((size_t)kv_head * r + key) * D + pair;
            a = *(const u32*)from;
            b = *(const u32*)(from + HALF);
        } else if (key < total) {
            const u16* from = chunk_qkv + (size_t)(key - r) * stride + (heads + kv_head) * D + pair;
            u32 x = *(const u32*)from, y = *(const u32*)(from + HALF);
            float2 c = *(const float2*)(cos + (key - r) * HALF + pair), s = *(const float2*)(sin + (key - r) * HALF + pair);
            a = pack(low(x) * c.x - low(y) * s.x, high(x) * c.y - high(y) * s.y);
            b = pack(low(y) * c.x + low(x) * s.x, high(y) * c.y + high(x) * s.y);
        }
        *(u32*)(keys + key * K_STRIDE + pair) = a;
        *(u32*)(keys + key * K_STRIDE + pair + HALF) = b;
    }
    for (int i = threadIdx.x; i < padded * (D / 2); i += 256) {
        int key = i / (D / 2), dim = i % (D / 2) * 2;
        u32 v = 0;
        if (key < r) {
            v = *(const u32*)(prefix_v + ((size_t)kv_head * r + key) * D + dim);
        } else if (key < total) {
            v = *(const u32*)(chunk_qkv + (size_t)(key - r) * stride + (heads + kv_heads + kv_head) * D + dim);
        }
        values[dim * V_STRIDE + key] = (u16)v;
        values[(dim + 1) * V_STRIDE + key] = (u16)(v >> 16);
    }
    __syncthreads();

    // 2. queries, rotated in registers: column i and i + D / 2 are in the same thread
    int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3, row = (threadIdx.x >> 5) * 16;
    if (row >= rows) return;
    u32 q[D / 8][2];
    load_queries(q, chunk_qkv + head * D, stride, row, rows);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int at = min(row + g + half * 8, rows - 1);
#pragma unroll
        for (int j = 0; j < D / 16; ++j) {
            u32 x = q[j][half], y = q[j + D / 16][half];
            float2 c = *(const float2*)(cos + at * HALF + j * 8 + 2 * t), s = *(const float2*)(sin + at * HALF + j * 8 + 2 * t);
            q[j][half] = pack(low(x) * c.x - low(y) * s.x, high(x) * c.y - high(y) * s.y);
            q[j + D / 16][half] = pack(low(y) * c.x + low(x) * s.x, high(y) * c.y + high(x) * s.y);
        }
    }

    // 3. 16 keys at a time, the softmax's maximum and sum kept up to date
    float sums[D / 8][4] = {}, greatest[2] = {MINUS_INFINITY, MINUS_INFINITY}, total_of[2] = {0, 0};
    float scale2 = scale * 1.44269504f; // exp2 is what the hardware has
    int last = min(r + row + 15, total - 1);
    for (int key = 0; key <= last; key += 16) {
        float s[2][4] = {};
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const u16* at = keys + (key + n * 8 + g) * K_STRIDE + 2 * t;
#pragma unroll
            for (int k = 0; k < D / 16; ++k) {
                u32 a[4] = {q[2 * k][0], q[2 * k][1], q[2 * k + 1][0], q[2 * k + 1][1]};
                multiply_add(s[n], a, *(const u32*)(at + k * 16), *(const u32*)(at + k * 16 + 8));
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int sees = min(r + row + g + half * 8, total - 1);
            float most = greatest[half];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& x = s[n][half * 2 + i];
                    x = key + n * 8 + 2 * t + i <= sees ? x * scale2 : MINUS_INFINITY;
                    most = fmaxf(most, x);
                }
            }
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            float shrink = exp2f(greatest[half] - most), sum = 0;
            greatest[half] = most;
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& x = s[n][half * 2 + i];
                    x = exp2f(x - most);
                    sum += x;
                }
            }
            total_of[half] = total_of[half] * shrink + sum;
#pragma unroll
            for (int j = 0; j < D / 8; ++j) {
                sums[j][half * 2] *= shrink;
                sums[j][half * 2 + 1] *= shrink;
            }
        }
        u32 p[4] = {pack(s[0][0], s[0][1]), pack(s[0][2], s[0][3]), pack(s[1][0], s[1][1]), pack(s[1][2], s[1][3])};
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
            const u16* at = values + (j * 8 + g) * V_STRIDE + key + 2 * t;
            multiply_add(sums[j], p, *(const u32*)at, *(const u32*)(at + 8));
        }
    }

    // 4. divide and write
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = total_of[half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        int at = row + g + half * 8;
        if (at >= rows) continue;
        u16* to = out + ((size_t)(first + at) * heads + head) * D + 2 * t;
#pragma unroll
        for (int j = 0; j < D / 8; ++j) *(u32*)(to + j * 8) = pack(sums[j][half * 2] / sum, sums[j][half * 2 + 1] / sum);
    }
}
#else
// The same for f32, plainly: a reference, not a fast path. Grid: chunk, query head. 256 threads.
extern "C" __global__ void __launch_bounds__(256) attend(
    T* out, const T* qkv, const int* starts, const float* cos, const float* sin,
    const T* prefix_k, const T* prefix_v, int r, int heads, int kv_heads, float scale) {
    extern __shared__ __align__(16) float room[]; // keys [KEYS][D + 1], a query and a row of weights for each warp
    int chunk = blockIdx.x, head = blockIdx.y, kv_head = head / (heads / kv_heads);
    int first = starts[chunk], rows = starts[chunk + 1] - first, stride = (heads + 2 * kv_heads) * D, total = r + rows;
    const float* chunk_qkv = qkv + (size_t)first * stride;
    for (int i = threadIdx.x; i < total * HALF; i += 256) {
        int key = i / HALF, pair = i % HALF;
        float a, b;
        if (key < r) {
            const float* from = prefix_k + ((size_t)kv_head * r + key) * D + pair;
            a = from[0];
            b = from[HALF];
        } else {
            const float* from = chunk_qkv + (size_t)(key - r) * stride + (heads + kv_head) * D + pair;
            float c = cos[(key - r) * HALF + pair], s = sin[(key - r) * HALF + pair];
            a = from[0] * c - from[HALF] * s;
            b = from[HALF] * c + from[0] * s;
        }
        room[key * (D + 1) + pair] = a;
        room[key * (D + 1) + pair + HALF] = b;
    }
    __syncthreads();
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    float* query = room + KEYS * (D + 1) + warp * (D + KEYS);
    float* weights = query + D;
    for (int row = warp; row < rows; row += 8) {
        const float* from = chunk_qkv + (size_t)row * stride + head * D;
        for (int i = lane; i < HALF; i += 32) {
            float c = cos[row * HALF + i], s = sin[row * HALF + i];
            query[i] = from[i] * c - from[i + HALF] * s;
            query[i + HALF] = from[i + HALF] * c + from[i] * s;
        }
        __syncwarp();
        int sees = r + row;
        float most = MINUS_INFINITY, sum = 0;
        for (int key = lane; key <= sees; key += 32) {
            float dot = 0;
            for (int i = 0; i < D; ++i) dot += query[i] * room[key * (D + 1) + i];
            weights[key] = dot * scale;
            most = fmaxf(most, dot * scale);
        }
        for (int step = 16; step > 0; step >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
        for (int key = lane; key <= sees; key += 32) {
            weights[key] = expf(weights[key] - most);
            sum += weights[key];
        }
        for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
        __syncwarp();
        for (int i = lane; i < D; i += 32) {
            float attended = 0;
            for (int key = 0; key <= sees; ++key) {
                const float* value = key < r ? prefix_v + ((size_t)kv_head * r + key) * D
                                             : chunk_qkv + (size_t)(key - r) * stride + (heads + kv_heads + kv_head) * D;
                attended += weights[key] * value[i];
            }
            out[((size_t)(first + row) * heads + head) * D + i] = attended / sum;
        }
        __syncwarp();
    }
}
#endif

// 16 queries of one head against all keys of the chunk, before RoPE, no mask: s[n] holds the logits, times log2(e), of
// columns 8 n + 2 t, + 1 of rows g and g + 8. Columns and rows from `tokens` on are minus infinity.
#if BF16
__device__ __forceinline__ void logits(float s[16][4], const u16* q, const u16* keys, int stride, int row, int tokens, float scale) {
    int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    u32 a[D / 8][2];
    load_queries(a, q, stride, row, tokens);
#pragma unroll
    for (int n = 0; n < 16; ++n) {
        s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
        const u16* at = keys + (n * 8 + g) * K_STRIDE + 2 * t;
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            u32 both[4] = {a[2 * k][0], a[2 * k][1], a[2 * k + 1][0], a[2 * k + 1][1]};
            multiply_add(s[n], both, *(const u32*)(at + k * 16), *(const u32*)(at + k * 16 + 8));
        }
    }
#else
#define K_STRIDE (D + 1)
__device__ __forceinline__ void logits(float s[16][4], const float* q, const float* keys, int stride, int row, int tokens, float scale) {
    int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
    for (int n = 0; n < 16; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
    const float* first = q + (size_t)min(row + g, tokens - 1) * stride;
    const float* second = q + (size_t)min(row + g + 8, tokens - 1) * stride;
    for (int i = 0; i < D; ++i) {
        float x = first[i], y = second[i];
#pragma unroll
        for (int n = 0; n < 16; ++n) {
            const float* at = keys + (n * 8 + 2 * t) * K_STRIDE + i;
            s[n][0] += x * at[0];
            s[n][1] += x * at[K_STRIDE];
            s[n][2] += y * at[0];
            s[n][3] += y * at[K_STRIDE];
        }
    }
#endif
#pragma unroll
    for (int n = 0; n < 16; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            bool real = n * 8 + 2 * t + (i & 1) < tokens && row + g + (i >> 1) * 8 < tokens;
            s[n][i] = real ? s[n][i] * scale : MINUS_INFINITY;
        }
    }
}

// Selection weights of a layer, the greatest of them, and their tokens. Grid: chunk, kv_head. 256 threads.
// selected: [chunk][heads of all layers][slots], this layer's heads from `place` on, ascending, zero behind the last.
// damaged[chunk]: at most this layer's place among the memory layers if a weight is not finite. exp_score: sums of exp(logit - greatest); otherwise of the softmax of each query.
extern "C" __global__ void __launch_bounds__(256) choose(
    u8* selected, int* damaged, const T* qkv, const int* starts,
    int heads, int kv_heads, int place, int all_heads, int slots, float scale, int exp_score) {
    extern __shared__ __align__(16) T key_room[]; // [128][K_STRIDE]
    __shared__ float columns[8][128];
    __shared__ float shared_most;
    int chunk = blockIdx.x, kv_head = blockIdx.y, group = heads / kv_heads;
    int first = starts[chunk], tokens = starts[chunk + 1] - first, stride = (heads + 2 * kv_heads) * D;
    const T* chunk_qkv = qkv + (size_t)first * stride;
    for (int i = threadIdx.x; i < 128 * D; i += 256) {
        int key = i / D, dim = i % D;
        key_room[key * K_STRIDE + dim] = key < tokens ? chunk_qkv[(size_t)key * stride + (heads + kv_head) * D + dim] : (T)0;
    }
    __syncthreads();
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, t = lane & 3, row = warp * 16;
    float scale2 = scale * 1.44269504f, sums[16][2] = {}, s[16][4], most = MINUS_INFINITY;
    if (exp_score) {
        // One maximum for the whole head.
        for (int head = 0; head < group && row < tokens; ++head) {
            logits(s, chunk_qkv + (kv_head * group + head) * D, key_room, stride, row, tokens, scale2);
            for (int n = 0; n < 16; ++n)
                for (int i = 0; i < 4; ++i) most = fmaxf(most, s[n][i]);
        }
        for (int step = 16; step > 0; step >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
        if (lane == 0) columns[warp][0] = most;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int i = 1; i < 8; ++i) most = fmaxf(most, columns[i][0]);
            shared_most = most;
        }
        __syncthreads();
        most = shared_most;
    }
    for (int head = 0; head < group && row < tokens; ++head) {
        logits(s, chunk_qkv + (kv_head * group + head) * D, key_room, stride, row, tokens, scale2);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float factor = 1;
            if (!exp_score) {
                most = MINUS_INFINITY;
#pragma unroll
                for (int n = 0; n < 16; ++n) most = fmaxf(most, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
                most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
                most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            }
            bool real = row + (lane >> 2) + half * 8 < tokens;
            float sum = 0;
#pragma unroll
            for (int n = 0; n < 16; ++n) {
#pragma unroll
                for (int i = half * 2; i < half * 2 + 2; ++i) {
                    s[n][i] = real ? exp2f(s[n][i] - most) : 0;
                    sum += s[n][i];
                }
            }
            if (!exp_score) {
                sum += __shfl_xor_sync(~0u, sum, 1);
                sum += __shfl_xor_sync(~0u, sum, 2);
                factor = real ? 1 / sum : 0;
            }
#pragma unroll
            for (int n = 0; n < 16; ++n) {
                sums[n][0] += s[n][half * 2] * factor;
                sums[n][1] += s[n][half * 2 + 1] * factor;
            }
        }
    }
    // Over the rows of a warp, then over the warps.
#pragma unroll
    for (int n = 0; n < 16; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float sum = sums[n][i];
            sum += __shfl_xor_sync(~0u, sum, 4);
            sum += __shfl_xor_sync(~0u, sum, 8);
            sum += __shfl_xor_sync(~0u, sum, 16);
            if (lane < 4) columns[warp][n * 8 + 2 * t + i] = sum;
        }
    }
    __syncthreads();
    if (warp != 0) return;
    float weight[4];
    bool broken = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int token = i * 32 + lane;
        float sum = 0;
        for (int w = 0; w < 8; ++w) sum += columns[w][token];
        broken |= token < tokens && !finite(sum);
        weight[i] = token < tokens ? sum : -1;
    }
    if (__any_sync(~0u, broken)) {
        if (lane == 0) atomicMin(&damaged[chunk], place / kv_heads);
        return;
    }
    // The greatest weights; of equal ones the lower token.
    u32 chosen = 0; // bit i: token i * 32 + lane
    for (int slot = 0; slot < min(slots, tokens); ++slot) {
        float best = -2;
        int at = 128;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (weight[i] > best) {
                best = weight[i];
                at = i * 32 + lane;
            }
        }
        for (int step = 16; step > 0; step >>= 1) {
            float other = __shfl_xor_sync(~0u, best, step);
            int other_at = __shfl_xor_sync(~0u, at, step);
            if (other > best || (other == best && other_at < at)) {
                best = other;
                at = other_at;
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i * 32 + lane == at) {
                weight[i] = -2;
                chosen |= 1u << i;
            }
        }
    }
    u8* to = selected + ((size_t)chunk * all_heads + place + kv_head) * slots;
    int before = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        u32 mask = __ballot_sync(~0u, chosen >> i & 1);
        if (chosen >> i & 1) to[before + __popc(mask & ((1u << lane) - 1))] = i * 32 + lane;
        before += __popc(mask);
    }
    for (int slot = before + lane; slot < slots; slot += 32) to[slot] = 0;
}

// The selected keys, rotated, and values of a layer. Grid: chunk, kv_head.
// vectors: [chunk][layer][K, V][kv_head][slot][D] f32; this layer begins at `offset` floats of `chunk_floats`.
// selected as in `choose`; all: take the first `slots` tokens instead.
extern "C" __global__ void gather(
    float* vectors, int* damaged, const T* qkv, const int* starts, const float* cos, const float* sin, const u8* selected,
    int heads, int kv_heads, int place, int all_heads, int slots, size_t offset, size_t chunk_floats, int all) {
    int chunk = blockIdx.x, kv_head = blockIdx.y;
    int first = starts[chunk], tokens = starts[chunk + 1] - first, stride = (heads + 2 * kv_heads) * D;
    const T* chunk_qkv = qkv + (size_t)first * stride;
    float* keys = vectors + chunk * chunk_floats + offset + (size_t)kv_head * slots * D;
    float* values = keys + (size_t)kv_heads * slots * D;
    bool broken = false;
    for (int i = threadIdx.x; i < slots * HALF; i += blockDim.x) {
        int slot = i / HALF, pair = i % HALF;
        float a = 0, b = 0, x = 0, y = 0;
        if (slot < tokens) {
            // Bounded, so that bytes of anything cannot lead out of the chunk.
            int token = all ? slot : min(tokens - 1, (int)selected[((size_t)chunk * all_heads + place + kv_head) * slots + slot]);
            const T* key = chunk_qkv + (size_t)token * stride + (heads + kv_head) * D + pair;
            const T* value = key + kv_heads * D;
            float c = cos[token * HALF + pair], s = sin[token * HALF + pair];
            a = up(key[0]) * c - up(key[HALF]) * s;
            b = up(key[HALF]) * c + up(key[0]) * s;
            x = up(value[0]);
            y = up(value[HALF]);
            broken |= !(finite(a) && finite(b) && finite(x) && finite(y));
        }
        keys[slot * D + pair] = a;
        keys[slot * D + pair + HALF] = b;
        values[slot * D + pair] = x;
        values[slot * D + pair + HALF] = y;
    }
    if (broken) atomicMin(&damaged[chunk], place / kv_heads);
}
