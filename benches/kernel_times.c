// Writes when each kernel and copy ran on the GPU, one line each: start and end in ns of the wall clock, GPU, stream,
// name.
//
// gcc -shared -fPIC -O2 -I CUDA/include -I CUDA/extras/CUPTI/include kernel_times.c -o kernel_times.so -L CUPTI_LIB -lcupti
// LD_PRELOAD=kernel_times.so KERNEL_TIMES=file PROGRAM; kernel_times.py sums them up.
#include <cupti.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static FILE *out;

static uint64_t CUPTIAPI wall_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * 1000000000u + now.tv_nsec;
}

static void CUPTIAPI give_buffer(uint8_t **buffer, size_t *size, size_t *max_records) {
    *size = 8 << 20;
    *buffer = aligned_alloc(8, *size);
    *max_records = 0;
}

static void CUPTIAPI take_buffer(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size, size_t valid) {
    CUpti_Activity *record = NULL;
    while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
        if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
            CUpti_ActivityKernel9 *kernel = (CUpti_ActivityKernel9 *)record;
            fprintf(out, "%llu %llu %u %u %s\n", (unsigned long long)kernel->start, (unsigned long long)kernel->end,
                    kernel->deviceId, kernel->streamId, kernel->name);
        } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
            CUpti_ActivityMemcpy5 *copy = (CUpti_ActivityMemcpy5 *)record;
            fprintf(out, "%llu %llu %u %u memcpy\n", (unsigned long long)copy->start, (unsigned long long)copy->end,
                    copy->deviceId, copy->streamId);
        } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
            CUpti_ActivityMemset4 *set = (CUpti_ActivityMemset4 *)record;
            fprintf(out, "%llu %llu %u %u memset\n", (unsigned long long)set->start, (unsigned long long)set->end,
                    set->deviceId, set->streamId);
        }
    }
    free(buffer);
}

static void finish(void) {
    cuptiActivityFlushAll(1);
    fclose(out);
}

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("KERNEL_TIMES");
    if (!path || !(out = fopen(path, "w"))) return;
    cuptiActivityRegisterTimestampCallback(wall_clock);
    cuptiActivityRegisterCallbacks(give_buffer, take_buffer);
    cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
    cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY);
    cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMSET);
    atexit(finish);
}
