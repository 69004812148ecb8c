// AdamW, eight elements a thread at a time, computed in f32. Inputs and outputs may be the same memory. Appended to
// kernels.cu, which has the types.

__device__ void load(const float *from, bool whole, int count, float *values) {
    if (whole) {
#pragma unroll
        for (int j = 0; j < 8; j += 4) {
            float4 four = *(const float4 *)(from + j);
            values[j] = four.x, values[j + 1] = four.y, values[j + 2] = four.z, values[j + 3] = four.w;
        }
    } else {
        for (int j = 0; j < count; j++) values[j] = from[j];
    }
}

__device__ void load(const bf16 *from, bool whole, int count, float *values) {
    if (whole) {
        Eight eight(*(const uint4 *)from);
#pragma unroll
        for (int j = 0; j < 8; j++) values[j] = eight.v[j];
    } else {
        for (int j = 0; j < count; j++) values[j] = low(from[j]);
    }
}

__device__ void store(float *to, bool whole, int count, const float *values) {
    if (whole) {
#pragma unroll
        for (int j = 0; j < 8; j += 4)
            *(float4 *)(to + j) = make_float4(values[j], values[j + 1], values[j + 2], values[j + 3]);
    } else {
        for (int j = 0; j < count; j++) to[j] = values[j];
    }
}

__device__ void store(bf16 *to, bool whole, int count, const float *values) {
    if (whole) {
        *(uint4 *)to = make_uint4(pair(values[0], values[1]), pair(values[2], values[3]), pair(values[4], values[5]),
                                  pair(values[6], values[7]));
    } else {
        for (int j = 0; j < count; j++) to[j] = (bf16)round_bf16(values[j]);
    }
}

// m / correction_1 / (sqrt(v / correction_2) + epsilon)
__device__ float delta(float m, float v, float epsilon, float correction_1, float correction_2, float *) {
    return (m / correction_1) / (sqrtf(v / correction_2) + epsilon);
}

// Good to a few units in the last place of f32, far more than bf16 keeps: exact division and root would take longer than
// the memory does.
__device__ float delta(float m, float v, float epsilon, float correction_1, float correction_2, bf16 *) {
    float root;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(__fdividef(v, correction_2)));
    return __fdividef(m, correction_1 * (root + epsilon));
}

// `correction_1` and `correction_2` are 1 - beta^time, `decay` is the learning rate times the weight decay. `aligned`: all
// addresses are multiples of 16.
template <typename P, typename M>
__device__ void adamw(const P *param, const P *grad, const M *moment_1, const M *moment_2, P *new_param, M *new_moment_1,
                      M *new_moment_2, size_t len, float beta_1, float beta_2, float epsilon, float correction_1,
                      float correction_2, float learning_rate, float decay, int cautious, int aligned) {
    size_t stride = (size_t)gridDim.x * blockDim.x * 8;
    for (size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8; i < len; i += stride) {
        int count = len - i < 8 ? (int)(len - i) : 8;
        bool whole = aligned && count == 8;
        float p[8] = {}, g[8] = {}, m[8] = {}, v[8] = {};
        load(param + i, whole, count, p);
        load(grad + i, whole, count, g);
        load(moment_1 + i, whole, count, m);
        load(moment_2 + i, whole, count, v);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            m[j] = m[j] * beta_1 + g[j] * (1.0f - beta_1);
            v[j] = v[j] * beta_2 + g[j] * g[j] * (1.0f - beta_2);
            bool decays = !cautious || (p[j] >= 0.0f) == (m[j] >= 0.0f);
            if (decays) p[j] -= p[j] * decay;
            p[j] -= delta(m[j], v[j], epsilon, correction_1, correction_2, (P *)0) * learning_rate;
        }
        store(new_param + i, whole, count, p);
        store(new_moment_1 + i, whole, count, m);
        store(new_moment_2 + i, whole, count, v);
    }
}

#define ADAMW(name, P, M)                                                                                               \
    extern "C" __global__ void name(const P *param, const P *grad, const M *moment_1, const M *moment_2, P *new_param,  \
                                    M *new_moment_1, M *new_moment_2, unsigned long long len, float beta_1,             \
                                    float beta_2, float epsilon, float correction_1, float correction_2,               \
                                    float learning_rate, float decay, int cautious, int aligned) {                      \
        adamw<P, M>(param, grad, moment_1, moment_2, new_param, new_moment_1, new_moment_2, len, beta_1, beta_2,        \
                    epsilon, correction_1, correction_2, learning_rate, decay, cautious, aligned);                      \
    }

ADAMW(adamw_f32, float, float)
ADAMW(adamw_bf16, bf16, bf16)
ADAMW(adamw_bf16_f32, bf16, float)
