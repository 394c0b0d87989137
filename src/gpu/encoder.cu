// What the forward pass of a text encoder (BERT) does beside matrix products, on an NVIDIA GPU.
//
// Compiled at run time (NVRTC), without headers, with
//   BF16  1: numbers that are multiplied are bf16 (`T`), 0: f32
//   D     width of a head, at most 64
// Rows of all texts stand one behind the other; text i has rows starts[i] .. starts[i + 1]. Sums are f32, in an order that
// depends on the text alone.

#define TILE 64 // keys at a time

// The sum over a block of 128 threads, the same in every thread.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float parts[4];
    for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(~0u, x, step);
    if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = x;
    __syncthreads();
    float total = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    __syncthreads();
    return total;
}

// x = norm(x), and the same in T for products.
__device__ __forceinline__ void layer_norm(float* x, T* rounded, const float* gamma, const float* beta, int width, float eps) {
    float sum = 0, squares = 0;
    for (int i = threadIdx.x; i < width; i += 128) sum += x[i];
    float mean = block_sum(sum) / width;
    for (int i = threadIdx.x; i < width; i += 128) squares += (x[i] - mean) * (x[i] - mean);
    float scale = 1 / sqrtf(block_sum(squares) / width + eps);
    for (int i = threadIdx.x; i < width; i += 128) {
        float value = (x[i] - mean) * scale * gamma[i] + beta[i];
        x[i] = value;
        put(rounded + i, value);
    }
}

// x = norm(words[id] + positions[position]); one block of 128 threads a row.
extern "C" __global__ void embed(
    float* x, T* rounded, const float* words, const float* positions, const u32* ids, const u32* places,
    const float* gamma, const float* beta, int width, float eps) {
    const float* word = words + (size_t)ids[blockIdx.x] * width;
    const float* position = positions + (size_t)places[blockIdx.x] * width;
    float* row = x + (size_t)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += 128) row[i] = word[i] + position[i];
    layer_norm(row, rounded + (size_t)blockIdx.x * width, gamma, beta, width, eps);
}

// x = norm(x + bias); one block of 128 threads a row.
extern "C" __global__ void add_norm(
    float* x, T* rounded, const float* bias, const float* gamma, const float* beta, int width, float eps) {
    float* row = x + (size_t)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += 128) row[i] += bias[i];
    layer_norm(row, rounded + (size_t)blockIdx.x * width, gamma, beta, width, eps);
}

// rows += bias, and their GELU if `gelu`; one block a row.
extern "C" __global__ void add_bias(T* rows, const float* bias, int width, int gelu) {
    T* row = rows + (size_t)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float x = up(row[i]) + bias[i];
        put(row + i, gelu ? 0.5f * x * (1 + erff(x * 0.70710678f)) : x);
    }
}

// Attention of all tokens over all tokens of a text. Grid: text, head and 32 queries (the head first). 256 threads: a warp takes 4 queries.
// qkv: [row][query, key, value][heads * D], queries scaled; out: [row][heads * D].
extern "C" __global__ void __launch_bounds__(256) attend(T* out, const T* qkv, const int* starts, int heads) {
    __shared__ float keys[TILE][D + 1], values[TILE][D], queries[32][D], weights[8][TILE];
    int text = blockIdx.x, head = blockIdx.y % heads, first = starts[text], tokens = starts[text + 1] - first;
    int begin = blockIdx.y / heads * 32, width = heads * D;
    if (begin >= tokens) return;
    const T* base = qkv + (size_t)first * 3 * width + head * D;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    for (int i = threadIdx.x; i < 32 * D; i += 256) {
        int row = begin + i / D;
        queries[i / D][i % D] = row < tokens ? up(base[(size_t)row * 3 * width + i % D]) : 0;
    }
    float sums[4][(D + 31) / 32] = {}, greatest[4], total[4] = {};
#pragma unroll
    for (int q = 0; q < 4; ++q) greatest[q] = MINUS_INFINITY;
    for (int from = 0; from < tokens; from += TILE) {
        int here = min(TILE, tokens - from);
        __syncthreads();
        for (int i = threadIdx.x; i < TILE * D; i += 256) {
            int key = i / D;
            const T* at = base + (size_t)(from + key) * 3 * width + i % D;
            keys[key][i % D] = key < here ? up(at[width]) : 0;
            values[key][i % D] = key < here ? up(at[2 * width]) : 0;
        }
        __syncthreads();
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const float* query = queries[warp * 4 + q];
            float a = 0, b = 0;
            for (int i = 0; i < D; ++i) {
                a = fmaf(query[i], keys[lane][i], a);
                b = fmaf(query[i], keys[lane + 32][i], b);
            }
            a = lane < here ? a : MINUS_INFINITY;
            b = lane + 32 < here ? b : MINUS_INFINITY;
            float most = fmaxf(a, b);
            for (int step = 16; step > 0; step >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
            most = fmaxf(most, greatest[q]);
            float shrink = expf(greatest[q] - most);
            greatest[q] = most;
            a = expf(a - most);
            b = expf(b - most);
            float sum = a + b;
            for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
            total[q] = total[q] * shrink + sum;
            weights[warp][lane] = a;
            weights[warp][lane + 32] = b;
            __syncwarp();
#pragma unroll
            for (int j = 0; j < (D + 31) / 32; ++j) {
                int dim = j * 32 + lane;
                float attended = sums[q][j] * shrink;
                if (dim < D)
                    for (int key = 0; key < here; ++key) attended = fmaf(weights[warp][key], values[key][dim], attended);
                sums[q][j] = attended;
            }
            __syncwarp();
        }
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
        int row = begin + warp * 4 + q;
#pragma unroll
        for (int j = 0; j < (D + 31) / 32; ++j) {
            int dim = j * 32 + lane;
            if (row < tokens && dim < D) put(out + (size_t)(first + row) * width + head * D + dim, sums[q][j] / total[q]);
        }
    }
}

// One vector of each text: the mean of its rows, or the first; one block a text.
extern "C" __global__ void pool(float* pooled, const float* x, const int* starts, int width, int mean) {
    int first = starts[blockIdx.x], tokens = starts[blockIdx.x + 1] - first;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float sum = 0;
        for (int row = 0; row < (mean ? tokens : min(tokens, 1)); ++row) sum += x[(size_t)(first + row) * width + i];
        pooled[(size_t)blockIdx.x * width + i] = mean && tokens > 0 ? sum / tokens : sum;
    }
}
