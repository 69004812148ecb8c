// AdamW, four elements a thread at a time, computed in f32. Inputs and outputs may be the same memory. Appended to
// kernels.cu, which has the types.

__device__ void load4(const float *from, bool whole, int count, float *values) {
    if (whole) {
        float4 four = *(const float4 *)from;
        values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
    } else {
        for (int j = 0; j < count; j++) values[j] = from[j];
    }
}

__device__ void load4(const bf16 *from, bool whole, int count, float *values) {
    if (whole) {
        uint2 four = *(const uint2 *)from;
        values[0] = low(four.x), values[1] = high(four.x), values[2] = low(four.y), values[3] = high(four.y);
    } else {
        for (int j = 0; j < count; j++) values[j] = low(from[j]);
    }
}

__device__ void store4(float *to, bool whole, int count, const float *values) {
    if (whole) {
        *(float4 *)to = make_float4(values[0], values[1], values[2], values[3]);
    } else {
        for (int j = 0; j < count; j++) to[j] = values[j];
    }
}

__device__ void store4(bf16 *to, bool whole, int count, const float *values) {
    if (whole) {
        *(uint2 *)to = make_uint2(pair(values[0], values[1]), pair(values[2], values[3]));
    } else {
        for (int j = 0; j < count; j++) to[j] = (bf16)round_bf16(values[j]);
    }
}

// `correction_1` and `correction_2` are 1 - beta^time, `decay` is the learning rate times the weight decay. `aligned`: all
// addresses are multiples of 16.
template <typename P, typename M>
__device__ void adamw(const P *param, const P *grad, const M *moment_1, const M *moment_2, P *new_param, M *new_moment_1,
                      M *new_moment_2, size_t len, float beta_1, float beta_2, float epsilon, float correction_1,
                      float correction_2, float learning_rate, float decay, int cautious, int aligned) {
    size_t stride = (size_t)gridDim.x * blockDim.x * 4;
    for (size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4; i < len; i += stride) {
        int count = len - i < 4 ? (int)(len - i) : 4;
        bool whole = aligned && count == 4;
        float p[4], g[4], m[4], v[4];
        load4(param + i, whole, count, p);
        load4(grad + i, whole, count, g);
        load4(moment_1 + i, whole, count, m);
        load4(moment_2 + i, whole, count, v);
        for (int j = 0; j < count; j++) {
            m[j] = m[j] * beta_1 + g[j] * (1.0f - beta_1);
            v[j] = v[j] * beta_2 + g[j] * g[j] * (1.0f - beta_2);
            float delta = (m[j] / correction_1) / (sqrtf(v[j] / correction_2) + epsilon);
            bool decays = !cautious || (p[j] >= 0.0f) == (m[j] >= 0.0f);
            if (decays) p[j] -= p[j] * decay;
            p[j] -= delta * learning_rate;
        }
        store4(new_param + i, whole, count, p);
        store4(new_moment_1 + i, whole, count, m);
        store4(new_moment_2 + i, whole, count, v);
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
