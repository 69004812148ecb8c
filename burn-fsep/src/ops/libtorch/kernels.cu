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

// An expert's activation and its derivatives, by the number that cuda.rs gives it: SwiGLU, GPT-OSS's clamped SwiGLU, GEGLU,
// GELU, squared ReLU. The last two have no gate.
struct Activated {
    float out, d_gate, d_up;
};

__device__ float normal_cdf(float x) { return 0.5f * (1.0f + erff(x * 0.70710678f)); }
__device__ float gelu_slope(float x) { return normal_cdf(x) + x * 0.39894228f * expf(-0.5f * x * x); }

template <int KIND> __device__ Activated activated(float gate, float up, float alpha, float limit) {
    Activated a;
    if (KIND == 0) {
        float s = sigmoid(gate), silu = gate * s;
        a.out = silu * up, a.d_gate = up * (s + silu * (1.0f - s)), a.d_up = silu;
    } else if (KIND == 1) {
        float g = fminf(gate, limit), u = fminf(fmaxf(up, -limit), limit) + 1.0f;
        float s = sigmoid(alpha * g), act = g * s;
        a.out = act * u;
        a.d_gate = gate <= limit ? u * (s + alpha * act * (1.0f - s)) : 0.0f;
        a.d_up = fabsf(up) <= limit ? act : 0.0f;
    } else if (KIND == 2) {
        float act = gate * normal_cdf(gate);
        a.out = act * up, a.d_gate = up * gelu_slope(gate), a.d_up = act;
    } else if (KIND == 3) {
        a.out = up * normal_cdf(up), a.d_gate = 0.0f, a.d_up = gelu_slope(up);
    } else {
        float relu = fmaxf(up, 0.0f);
        a.out = relu * relu, a.d_gate = 0.0f, a.d_up = 2.0f * relu;
    }
    return a;
}

// One block a row: hidden = activation(gate, up), with gate, if there is one, and up side by side.
template <int KIND>
__device__ void activate(const uint4 *first, uint4 *hidden, int width, float alpha, float limit) {
    const bool gated = KIND < 3;
    const uint4 *gates = first + (size_t)blockIdx.x * (gated ? 2 : 1) * width;
    const uint4 *ups = gates + (gated ? width : 0);
    uint4 *out = hidden + (size_t)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        Eight gate(gates[i]), up(ups[i]), result;
#pragma unroll
        for (int j = 0; j < 8; j++) result.v[j] = activated<KIND>(gate.v[j], up.v[j], alpha, limit).out;
        out[i] = result.raw();
    }
}

// One block a row: gradient of gate and up, and hidden once more.
template <int KIND>
__device__ void activate_backward(const uint4 *first, const uint4 *grad, uint4 *d_first, uint4 *hidden, int width,
                                  float alpha, float limit) {
    const bool gated = KIND < 3;
    size_t start = (size_t)blockIdx.x * (gated ? 2 : 1) * width;
    const uint4 *gates = first + start, *ups = gates + (gated ? width : 0);
    uint4 *d_gates = d_first + start, *d_ups = d_gates + (gated ? width : 0);
    size_t row = (size_t)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        Eight gate(gates[i]), up(ups[i]), g(grad[row + i]), d_gate, d_up, result;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            Activated a = activated<KIND>(gate.v[j], up.v[j], alpha, limit);
            result.v[j] = a.out;
            d_gate.v[j] = g.v[j] * a.d_gate;
            d_up.v[j] = g.v[j] * a.d_up;
        }
        if (gated) d_gates[i] = d_gate.raw();
        d_ups[i] = d_up.raw();
        hidden[row + i] = result.raw();
    }
}

#define ACTIVATION(KIND, NAME)                                                                                         \
    extern "C" __global__ void NAME(const uint4 *first, uint4 *hidden, int width, float alpha, float limit) {          \
        activate<KIND>(first, hidden, width, alpha, limit);                                                            \
    }                                                                                                                  \
    extern "C" __global__ void NAME##_backward(const uint4 *first, const uint4 *grad, uint4 *d_first, uint4 *hidden,   \
                                               int width, float alpha, float limit) {                                  \
        activate_backward<KIND>(first, grad, d_first, hidden, width, alpha, limit);                                    \
    }
ACTIVATION(0, swiglu)
ACTIVATION(1, clamped_swiglu)
ACTIVATION(2, geglu)
ACTIVATION(3, gelu)
ACTIVATION(4, relu_squared)

// One warp a row: indices of its largest numbers, the largest first and of equal ones the lower index; what is no number
// counts as the smallest.
extern "C" __global__ void top_k(const float *numbers, long long *chosen, int rows, int width, int topk) {
    extern __shared__ int keys_of_block[];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int row = blockIdx.x * (blockDim.x / 32) + warp;
    if (row >= rows) return;
    // Integers in the order of the numbers; below all of them is what was chosen already.
    const int TAKEN = 0x80000000;
    int *keys = keys_of_block + warp * width;
    for (int i = lane; i < width; i += 32) {
        float number = numbers[(size_t)row * width + i] + 0.0f;
        int bits = __float_as_int(number != number ? __int_as_float(0xff800000) : number);
        keys[i] = bits >= 0 ? bits : bits ^ 0x7fffffff;
    }
    __syncwarp();
    for (int k = 0; k < topk; k++) {
        int key = TAKEN, at = width;
        for (int i = lane; i < width; i += 32)
            if (keys[i] > key || (keys[i] == key && i < at)) key = keys[i], at = i;
        for (int offset = 16; offset > 0; offset /= 2) {
            int other = __shfl_xor_sync(0xffffffffu, key, offset), other_at = __shfl_xor_sync(0xffffffffu, at, offset);
            if (other > key || (other == key && other_at < at)) key = other, at = other_at;
        }
        if (lane == 0) {
            chosen[(size_t)row * topk + k] = at;
            keys[at] = TAKEN;
        }
        __syncwarp();
    }
}

// One block a token: sum over its assignments of its probabilities (1 without any) times their rows. A row below 0 is none.
extern "C" __global__ void combine(const uint4 *rows, const long long *row_of, const bf16 *probs, uint4 *out, int topk,
                                   int width) {
    size_t first = (size_t)blockIdx.x * topk;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        Eight sum;
#pragma unroll
        for (int j = 0; j < 8; j++) sum.v[j] = 0.0f;
        for (int k = 0; k < topk; k++) {
            long long at = row_of[first + k];
            if (at < 0) continue;
            float prob = probs ? low(probs[first + k]) : 1.0f;
            Eight row(rows[(size_t)at * width + i]);
#pragma unroll
            for (int j = 0; j < 8; j++) sum.v[j] += prob * row.v[j];
        }
        out[(size_t)blockIdx.x * width + i] = sum.raw();
    }
}

// One block a token: gradients of its assignments' rows and of its probabilities (1 without any), whichever is not null. A row
// below 0 is none.
extern "C" __global__ void combine_backward(const uint4 *grad, const uint4 *rows, const long long *row_of,
                                            const bf16 *probs, uint4 *d_rows, bf16 *d_probs, int topk, int width) {
    __shared__ float sums[32];
    size_t first = (size_t)blockIdx.x * topk;
    for (int k = 0; k < topk; k++) {
        // The same for all threads of the block.
        if (row_of[first + k] < 0) {
            if (d_probs && threadIdx.x == 0) d_probs[first + k] = 0;
            continue;
        }
        size_t row = (size_t)row_of[first + k] * width;
        float prob = probs ? low(probs[first + k]) : 1.0f;
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
