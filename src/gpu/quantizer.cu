// Vectors to the indices of their nearest centroids, on an NVIDIA GPU; compiled at run time without headers.
//
// The answer is that of the CPU's kernels, bit for bit: the column with the largest
//     start + x[0] c[0] + x[1] c[1] + ...   (start = -|c|^2 / 2; fused multiply-adds in this order; ties: the lower)
// Products of fp16 on tensor cores only screen: each thread keeps its two best groups of 8 columns and the value of its
// third. A proven bound of the error says which groups may hold the answer; mostly that is one, whose columns are
// compared in f32. Where a third group may hold it too, the row goes to `nearest_exact`: all columns in f32.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned char u8;

#define MINUS_INFINITY __int_as_float(0xff800000)
#define PAD 128   // columns are padded to a multiple of this
#define ROWS 32   // rows of a warp

__device__ __forceinline__ u32 pack_halves(float low, float high) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ float half_to_float(u32 bits) {
    float x;
    asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(x) : "r"(bits));
    return x;
}
__device__ __forceinline__ void multiply_add(float d[4], const u32 a[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Copies 16 bytes into shared memory in the background.
__device__ __forceinline__ void copy16(void* to, const void* from) {
    u32 at = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from));
}

// rotated[i] = matrix x + bias for row i of this codec: block i / per of its blocks of `per` vectors, of which every
// `step`th belongs to it, from `first` on. 128 threads, a row each; shared memory holds the rows, [in][129], and the
// matrix, [in][out rounded up to 16]. Without matrix the row is copied.
extern "C" __global__ void __launch_bounds__(128) rotate(
    float* rotated, const float* vectors, const float* matrix, const float* bias,
    int rows, int d_in, int d_out, int per, int step, int first) {
    extern __shared__ __align__(16) float table[];
    int width = (d_out + 15) & ~15, begin = blockIdx.x * 128, here = min(128, rows - begin);
    float* x = table + (matrix ? d_in * width : 0);
    for (int i = threadIdx.x; i < here * d_in; i += 128) {
        int row = begin + i / d_in, k = i % d_in;
        x[k * 129 + i / d_in] = vectors[(((size_t)(row / per) * step + first) * per + row % per) * d_in + k];
    }
    if (matrix)
        for (int i = threadIdx.x; i < d_in * width / 4; i += 128) ((float4*)table)[i] = ((const float4*)matrix)[i];
    __syncthreads();
    if (threadIdx.x >= here) return;
    float* to = rotated + (size_t)(begin + threadIdx.x) * d_out;
    x += threadIdx.x;
    if (!matrix) {
        for (int k = 0; k < d_in; ++k) to[k] = x[k * 129];
        return;
    }
    for (int o = 0; o < width; o += 16) {
        float sums[16] = {};
#pragma unroll 4
        for (int k = 0; k < d_in; ++k) {
            float value = x[k * 129];
#pragma unroll
            for (int j = 0; j < 16; j += 4) {
                float4 column = *(const float4*)(table + k * width + o + j);
                sums[j] = fmaf(value, column.x, sums[j]);
                sums[j + 1] = fmaf(value, column.y, sums[j + 1]);
                sums[j + 2] = fmaf(value, column.z, sums[j + 2]);
                sums[j + 3] = fmaf(value, column.w, sums[j + 3]);
            }
        }
        if (bias) {
#pragma unroll
            for (int j = 0; j < 16; ++j)
                if (o + j < d_out) sums[j] += bias[o + j];
        }
#pragma unroll
        for (int j = 0; j < 16; j += 4) {
            if (d_out % 4 == 0 && o + j < d_out) {
                *(float4*)(to + o + j) = make_float4(sums[j], sums[j + 1], sums[j + 2], sums[j + 3]);
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (o + j + i < d_out) to[o + j + i] = sums[j + i];
            }
        }
    }
}

// `column`: where the first number of the column stands, `stride`: how far it is to the next.
__device__ __forceinline__ float exact(const float* x, const float* column, int stride, float start, int depth) {
    float sum = start;
    for (int k = 0; k < depth; ++k) sum = fmaf(x[k], column[(size_t)k * stride], sum);
    return sum;
}

// For each row the nearest column of part blockIdx.y. 256 threads, 32 rows a warp.
// rows: [row][stride], the part's floats from part * depth on; halves: [part][column][16 KSTEPS + 8] fp16 of scale * c, the
// columns padded to a multiple of PAD; starts: [part][column] likewise, minus infinity behind the last; centroids:
// [part][column][depth] f32, not padded; bounds: [part] (scale, greatest |scale c|, greatest |scale c - fp16| / |scale c|,
// greatest |scale c - fp16|); found: [row][parts]; doubtful: [part] the number, then [part][rows].
template <int KSTEPS>
__device__ __forceinline__ void nearest(
    u32* found, u32* doubtful, const float* rows, const u16* halves, const float* starts, const float* centroids,
    const float4* bounds, int count, int row_count, int stride, int depth, int parts) {
    const int WIDTH = KSTEPS * 16 + 8, TILE = KSTEPS > 5 ? 64 : 128; // columns in shared memory at a time, twice
    __shared__ __align__(16) u16 tile[2][TILE * WIDTH];
    __shared__ __align__(16) float tile_start[2][TILE];
    int part = blockIdx.y, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    int first = (blockIdx.x * 8 + warp) * ROWS, padded = (count + PAD - 1) / PAD * PAD;
    float4 bound = bounds[part];
    starts += (size_t)part * padded;
    centroids += (size_t)part * count * depth;
    halves += (size_t)part * padded * WIDTH;
    auto fetch = [&](int from) {
        int side = from / TILE & 1;
        const u16* source = halves + (size_t)from * WIDTH;
        for (int i = threadIdx.x * 8; i < TILE * WIDTH; i += 256 * 8) copy16(tile[side] + i, source + i);
        if (threadIdx.x < TILE / 4) copy16(tile_start[side] + threadIdx.x * 4, starts + from + threadIdx.x * 4);
        asm volatile("cp.async.commit_group;");
    };
    fetch(0);

    // 1. rows in fp16, each by a power of two within [1, 2), and how far fp16 is off
    u32 a[2][KSTEPS][4];
    float scale[4], factor[4], length[4], off[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) { // rows g + 8 r of the warp
        int row = first + g + 8 * r;
        const float* x = rows + (size_t)min(row, row_count - 1) * stride + part * depth;
        float v[KSTEPS][4], most = 0;
#pragma unroll
        for (int k = 0; k < KSTEPS; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int at = k * 16 + 2 * t + (i & 1) + (i >> 1) * 8;
                v[k][i] = at < depth ? x[at] : 0;
                most = fmaxf(most, fabsf(v[k][i]));
            }
        }
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        u32 exponent = __float_as_uint(most) >> 23;
        float s = exponent > 0 && exponent < 254 ? __uint_as_float((254 - exponent) << 23) : 1;
        float squares = 0, off_squares = 0;
#pragma unroll
        for (int k = 0; k < KSTEPS; ++k) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float low = v[k][2 * i] * s, high = v[k][2 * i + 1] * s;
                u32 both = pack_halves(low, high);
                a[r >> 1][k][(r & 1) + 2 * i] = both;
                float low_off = half_to_float(both & 0xffff) - low, high_off = half_to_float(both >> 16) - high;
                squares += low * low + high * high;
                off_squares += low_off * low_off + high_off * high_off;
            }
        }
        for (int step = 1; step < 4; step <<= 1) {
            squares += __shfl_xor_sync(~0u, squares, step);
            off_squares += __shfl_xor_sync(~0u, off_squares, step);
        }
        scale[r] = s;
        factor[r] = s * bound.x;
        length[r] = sqrtf(squares);
        off[r] = sqrtf(off_squares);
    }

    // 2. all columns, a tile at a time; a group is the 2 columns of this thread in 4 blocks of 8
    float best[4], second[4], third[4];
    int best_at[4], second_at[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) best[r] = second[r] = third[r] = MINUS_INFINITY, best_at[r] = second_at[r] = 0;
    for (int from = 0; from < padded; from += TILE) {
        asm volatile("cp.async.wait_group 0;");
        __syncthreads();
        if (from + TILE < padded) fetch(from + TILE);
        int side = from / TILE & 1;
#pragma unroll 1
        for (int group = 0; group < TILE; group += 32) {
            float most[4] = {MINUS_INFINITY, MINUS_INFINITY, MINUS_INFINITY, MINUS_INFINITY};
#pragma unroll
            for (int n = group; n < group + 32; n += 8) {
                float d[2][4] = {};
                const u16* at = tile[side] + (n + g) * WIDTH + 2 * t;
#pragma unroll
                for (int k = 0; k < KSTEPS; ++k) {
                    u32 b0 = *(const u32*)(at + k * 16), b1 = *(const u32*)(at + k * 16 + 8);
                    multiply_add(d[0], a[0][k], b0, b1);
                    multiply_add(d[1], a[1][k], b0, b1);
                }
                float2 start = *(const float2*)(tile_start[side] + n + 2 * t);
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    most[r] = fmaxf(most[r], fmaf(start.x, factor[r], d[r >> 1][(r & 1) * 2]));
                    most[r] = fmaxf(most[r], fmaf(start.y, factor[r], d[r >> 1][(r & 1) * 2 + 1]));
                }
            }
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                third[r] = fmaxf(third[r], fminf(second[r], most[r]));
                second_at[r] = most[r] > best[r] ? best_at[r] : most[r] > second[r] ? from + group : second_at[r];
                second[r] = fmaxf(second[r], fminf(best[r], most[r]));
                best_at[r] = most[r] > best[r] ? from + group : best_at[r];
                best[r] = fmaxf(best[r], most[r]);
            }
        }
        __syncthreads();
    }

    // 3. which groups may hold the nearest
#pragma unroll 1
    for (int r = 0; r < 4; ++r) {
        int row = first + g + 8 * r;
        float most = best[r];
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        // Scores are times scale of row and table. The best column is at most `reach` away, so a better one is no longer
        // than |x| + reach, and no more is a column that only seems best. Twice the error of one column; the last term
        // is for the sums in f32, here and on the CPU.
        float loose = off[r] * bound.y + length[r] * bound.w + 6e-5f * length[r] * bound.y;
        float x_length = length[r] / scale[r];
        float reach = sqrtf(fmaxf(x_length * x_length * 1.00001f - 2 * (most - loose) / factor[r], 0.0f));
        float longest = fminf((x_length + reach) * bound.x * 1.0001f, bound.y);
        float error = off[r] * longest + length[r] * fminf(longest * bound.z + 1e-6f, bound.w);
        float least = most - 2.002f * error - 6e-5f * (length[r] * longest + 0.5f * scale[r] / bound.x * longest * longest);
        // Bit m: the best group of member m of the quad; bit m + 4: its second.
        u32 open = __ballot_sync(~0u, best[r] >= least) >> (lane & 28) & 0xf;
        open |= (__ballot_sync(~0u, second[r] >= least) >> (lane & 28) & 0xf) << 4;
        bool doubt = (__ballot_sync(~0u, !(third[r] < least)) >> (lane & 28) & 0xf) != 0 || open == 0;
        const float* x = rows + (size_t)min(row, row_count - 1) * stride + part * depth;
        float value = MINUS_INFINITY;
        int chosen = 0;
        if (doubt) open = 0;
        while (__any_sync(~0u, open != 0)) {
            int bit = __ffs(open) - 1, member = bit & 3;
            int first_from = __shfl_sync(~0u, best_at[r], (lane & 28) + member);
            int second_from = __shfl_sync(~0u, second_at[r], (lane & 28) + member);
            if (open == 0) continue;
            open &= open - 1;
            int from = bit < 4 ? first_from : second_from;
            for (int j = t; j < 8; j += 4) {
                int column = from + (j >> 1) * 8 + 2 * member + (j & 1);
                if (column >= count) continue;
                float sum = exact(x, centroids + (size_t)column * depth, 1, starts[column], depth);
                if (sum > value || (sum == value && column < chosen)) {
                    value = sum;
                    chosen = column;
                }
            }
        }
        for (int step = 1; step < 4; step <<= 1) {
            float other = __shfl_xor_sync(~0u, value, step);
            int other_at = __shfl_xor_sync(~0u, chosen, step);
            if (other > value || (other == value && other_at < chosen)) {
                value = other;
                chosen = other_at;
            }
        }
        if (t == 0 && row < row_count) {
            found[(size_t)row * parts + part] = chosen;
            if (doubt) doubtful[parts + (size_t)part * row_count + atomicAdd(doubtful + part, 1)] = row;
        }
    }
}

#define NEAREST(K) \
    extern "C" __global__ void __launch_bounds__(256) nearest_##K( \
        u32* found, u32* doubtful, const float* rows, const u16* halves, const float* starts, const float* centroids, \
        const float4* bounds, int count, int row_count, int stride, int depth, int parts) { \
        nearest<K>(found, doubtful, rows, halves, starts, centroids, bounds, count, row_count, stride, depth, parts); \
    }
NEAREST(1) NEAREST(2) NEAREST(3) NEAREST(4) NEAREST(5) NEAREST(6) NEAREST(7) NEAREST(8)

// The doubtful rows, all columns in f32: columns is [part][depth][column]. Grid: any number, part. 256 threads; 8 rows at a
// time, so that a column is read once for 8.
extern "C" __global__ void __launch_bounds__(256) nearest_exact(
    u32* found, const u32* doubtful, const float* rows, const float* starts, const float* columns,
    int count, int row_count, int stride, int depth, int parts) {
    __shared__ float x[128][8], values[8][8];
    __shared__ int at[8][8];
    int part = blockIdx.y, padded = (count + PAD - 1) / PAD * PAD, doubts = doubtful[part];
    doubtful += parts + (size_t)part * row_count;
    columns += (size_t)part * depth * count;
    starts += (size_t)part * padded;
    for (int i = blockIdx.x * 8; i < doubts; i += gridDim.x * 8) {
        __syncthreads();
        for (int k = threadIdx.x; k < depth * 8; k += 256) {
            x[k / 8][k % 8] = rows[(size_t)doubtful[min(i + k % 8, doubts - 1)] * stride + part * depth + k / 8];
        }
        __syncthreads();
        float best[8];
        int best_at[8];
#pragma unroll
        for (int r = 0; r < 8; ++r) best[r] = MINUS_INFINITY, best_at[r] = 0;
        for (int column = threadIdx.x; column < count; column += 256) {
            float sums[8];
#pragma unroll
            for (int r = 0; r < 8; ++r) sums[r] = starts[column];
            for (int k = 0; k < depth; ++k) {
                float c = columns[(size_t)k * count + column];
#pragma unroll
                for (int r = 0; r < 8; ++r) sums[r] = fmaf(x[k][r], c, sums[r]);
            }
#pragma unroll
            for (int r = 0; r < 8; ++r) {
                if (sums[r] > best[r]) {
                    best[r] = sums[r];
                    best_at[r] = column;
                }
            }
        }
#pragma unroll
        for (int r = 0; r < 8; ++r) {
            for (int step = 16; step > 0; step >>= 1) {
                float other = __shfl_xor_sync(~0u, best[r], step);
                int other_at = __shfl_xor_sync(~0u, best_at[r], step);
                if (other > best[r] || (other == best[r] && other_at < best_at[r])) {
                    best[r] = other;
                    best_at[r] = other_at;
                }
            }
            if ((threadIdx.x & 31) == 0) {
                values[r][threadIdx.x >> 5] = best[r];
                at[r][threadIdx.x >> 5] = best_at[r];
            }
        }
        __syncthreads();
        int r = threadIdx.x;
        if (r < 8 && i + r < doubts) {
            float most = values[r][0];
            int chosen = at[r][0];
            for (int w = 1; w < 8; ++w) {
                if (values[r][w] > most || (values[r][w] == most && at[r][w] < chosen)) {
                    most = values[r][w];
                    chosen = at[r][w];
                }
            }
            found[(size_t)doubtful[i + r] * parts + part] = chosen;
        }
    }
}

// rows -= the centroids found. One thread a float.
extern "C" __global__ void subtract(float* rows, const u32* found, const float* columns, int count, int row_count, int depth, int parts) {
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    int width = depth * parts;
    if (i >= (size_t)row_count * width) return;
    int part = i % width / depth, k = i % width % depth;
    rows[i] -= columns[((size_t)part * depth + k) * count + found[i / width * parts + part]];
}

// The codes: indices of `bits` bits one after the other, lowest bit first, the two fields each from a byte on. Rows and
// places as in `rotate`; slots from counts[chunk] on are zero bytes.
extern "C" __global__ void __launch_bounds__(256) pack_codes(
    u8* codes, const u32* found1, const u32* found2, const int* starts, int rows, int parts1, int bits1, int parts2, int bits2,
    int code_bytes, int per, int step, int first, int slots, int vectors_of_chunk) {
    int row = blockIdx.x * 256 + threadIdx.x;
    if (row >= rows) return;
    size_t at = ((size_t)(row / per) * step + first) * per + row % per;
    int chunk = at / vectors_of_chunk, slot = at % slots;
    u8* to = codes + at * code_bytes;
    if (slot >= starts[chunk + 1] - starts[chunk]) {
        for (int i = 0; i < code_bytes; ++i) to[i] = 0;
        return;
    }
    for (int field = 0; field < 2; ++field) {
        const u32* found = field ? found2 + (size_t)row * parts2 : found1 + (size_t)row * parts1;
        int parts = field ? parts2 : parts1, bits = field ? bits2 : bits1, filled = 0;
        unsigned long long buffer = 0;
        for (int part = 0; part < parts; ++part) {
            buffer |= (unsigned long long)found[part] << filled;
            filled += bits;
            while (filled >= 8) {
                *to++ = (u8)buffer;
                buffer >>= 8;
                filled -= 8;
            }
        }
        if (filled > 0) *to++ = (u8)buffer;
    }
}
