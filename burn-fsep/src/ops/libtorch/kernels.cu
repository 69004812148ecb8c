// Fused kernels for bf16, 8 elements a thread at a time; products and sums in f32. `width` counts groups of 8.
// Compiled at run time for the GPU at hand, so nothing here may include a header.

typedef unsigned int u32;
typedef unsigned short bf16;

__device__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Round to the nearest, ties to even; NaN stays NaN.
#if __CUDA_ARCH__ >= 800
__device__ u32 pair(float first, float second) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

__device__ u32 round_bf16(float value) { return pair(value, 0.0f) & 0xffffu; }
#else
__device__ u32 round_bf16(float value) {
    u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

__device__ u32 pair(float first, float second) { return round_bf16(first) | (round_bf16(second) << 16); }
#endif

// Good to a few units in the last place of f32, far more than bf16 keeps.
__device__ float sigmoid(float value) { return __fdividef(1.0f, 1.0f + __expf(-value)); }

struct Eight {
    float v[8];
    __device__ Eight() {}
    __device__ Eight(uint4 raw) {
        u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v[2 * i] = low(words[i]);
            v[2 * i + 1] = high(words[i]);
        }
    }
    __device__ uint4 raw() const {
        return make_uint4(pair(v[0], v[1]), pair(v[2], v[3]), pair(v[4], v[5]), pair(v[6], v[7]));
    }
};

// One block a row: hidden = silu(gate) * up, with gate and up side by side.
extern "C" __global__ void swiglu(const uint4 *gate_up, uint4 *hidden, int width) {
    const uint4 *gates = gate_up + (size_t)blockIdx.x * 2 * width;
    uint4 *out = hidden + (size_t)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        Eight gate(gates[i]), up(gates[width + i]), result;
#pragma unroll
        for (int j = 0; j < 8; j++) result.v[j] = gate.v[j] * sigmoid(gate.v[j]) * up.v[j];
        out[i] = result.raw();
    }
}

// One block a row: gradient of gate and up, and hidden once more.
extern "C" __global__ void swiglu_backward(const uint4 *gate_up, const uint4 *grad, uint4 *d_gate_up, uint4 *hidden,
                                           int width) {
    const uint4 *gates = gate_up + (size_t)blockIdx.x * 2 * width;
    uint4 *d_gates = d_gate_up + (size_t)blockIdx.x * 2 * width;
    size_t row = (size_t)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        Eight gate(gates[i]), up(gates[width + i]), g(grad[row + i]), d_gate, d_up, result;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float s = sigmoid(gate.v[j]);
            float silu = gate.v[j] * s;
            result.v[j] = silu * up.v[j];
            d_up.v[j] = g.v[j] * silu;
            d_gate.v[j] = g.v[j] * up.v[j] * (s + silu * (1.0f - s));
        }
        d_gates[i] = d_gate.raw();
        d_gates[width + i] = d_up.raw();
        hidden[row + i] = result.raw();
    }
}

// One block a token: sum over its assignments of its probabilities (1 without any) times their rows.
extern "C" __global__ void combine(const uint4 *rows, const long long *row_of, const bf16 *probs, uint4 *out, int topk,
                                   int width) {
    size_t first = (size_t)blockIdx.x * topk;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        Eight sum;
#pragma unroll
        for (int j = 0; j < 8; j++) sum.v[j] = 0.0f;
        for (int k = 0; k < topk; k++) {
            float prob = probs ? low(probs[first + k]) : 1.0f;
            Eight row(rows[(size_t)row_of[first + k] * width + i]);
#pragma unroll
            for (int j = 0; j < 8; j++) sum.v[j] += prob * row.v[j];
        }
        out[(size_t)blockIdx.x * width + i] = sum.raw();
    }
}

// One block a token: gradients of its assignments' rows and of its probabilities, whichever is not null.
extern "C" __global__ void combine_backward(const uint4 *grad, const uint4 *rows, const long long *row_of,
                                            const bf16 *probs, uint4 *d_rows, bf16 *d_probs, int topk, int width) {
    __shared__ float sums[32];
    size_t first = (size_t)blockIdx.x * topk;
    for (int k = 0; k < topk; k++) {
        size_t row = (size_t)row_of[first + k] * width;
        float prob = low(probs[first + k]);
        float dot = 0.0f;
        for (int i = threadIdx.x; i < width; i += blockDim.x) {
            Eight g(grad[(size_t)blockIdx.x * width + i]);
            if (d_probs) {
                Eight output(rows[row + i]);
#pragma unroll
                for (int j = 0; j < 8; j++) dot += output.v[j] * g.v[j];
            }
            if (d_rows) {
#pragma unroll
                for (int j = 0; j < 8; j++) g.v[j] *= prob;
                d_rows[row + i] = g.raw();
            }
        }
        if (d_probs) {
            for (int offset = 16; offset > 0; offset /= 2) dot += __shfl_down_sync(0xffffffffu, dot, offset);
            if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = dot;
            __syncthreads();
            if (threadIdx.x == 0) {
                float sum = 0.0f;
                for (int warp = 0; warp < blockDim.x / 32; warp++) sum += sums[warp];
                d_probs[first + k] = (bf16)round_bf16(sum);
            }
            __syncthreads();
        }
    }
}

// Element i of the sums of all experts: of each expert's rows of the received gradients, in the order of `rows`.
// `starts` says where an expert's rows begin in `rows`; `len` elements a row.
extern "C" __global__ void sum_replicas(const void *received, void *sums, const int *starts, const int *rows,
                                        long long len, float scale, int is_half, int to_half) {
    int expert = blockIdx.y;
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= len) return;
    float sum = 0.0f;
    for (int r = starts[expert]; r < starts[expert + 1]; r++) {
        long long at = (long long)rows[r] * len + i;
        sum += is_half ? low(((const bf16 *)received)[at]) : ((const float *)received)[at];
    }
    sum *= scale;
    long long at = (long long)expert * len + i;
    if (to_half)
        ((bf16 *)sums)[at] = (bf16)round_bf16(sum);
    else
        ((float *)sums)[at] = sum;
}
